import shutil
import struct

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from helpers.gguf_files import (
    TEMPLATE,
    TOKENS,
    gguf_weights,
    make_adapter,
    make_model,
    names_of,
    permuted,
    rewrite,
    through,
    write_gguf,
)

from loram_cli.errors import LoramError, UsageError
from loram_cli.export.gguf_file import GgufFile
from loram_cli.export.gguf_merge import merge, plan_merge
from loram_cli.export.gguf_types import WRITABLE, decode
from loram_cli.lora.adapter import LoraAdapter, LoraPair
from loram_cli.reporting import NullReporter


def made(tmp_path, model_type="llama", kind=Type.F32, metadata=(), **changes):
    """A GGUF base, an adapter for its layers, and what their sum is in float32."""
    model = make_model(tmp_path / "model", model_type, **changes)
    base = write_gguf(model, tmp_path / "base.gguf", kind, **dict(metadata))
    adapter = LoraAdapter.read(make_adapter(model, tmp_path / "adapter", head=False))
    return model, base, adapter


def updates(model, adapter):
    names, sums = names_of(model), {}
    for module, pair in adapter.pairs.items():
        delta = adapter.scaling(module) * pair.lora_b @ pair.lora_a
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if module.endswith(part) and names.family.gguf.architecture == "llama":
                delta = permuted(delta, heads)
        sums[names.tensor(module)] = delta
    return sums


def run(adapter, base, out, **how):
    plan = plan_merge(adapter, base, out, **how)
    merge(adapter, plan, out, NullReporter(), force=how.get("force", False))
    return plan


def weights_of(path):
    file = GgufFile.open(path)
    return {
        name: torch.cat([decode(rows, t.kind) for _, rows in file.read_rows(t)]).reshape(t.shape)
        for name, t in file.tensors.items()
    }


def assert_stored(got, want):
    """Equal, but for what lies between two steps of its type: sums differ in their last bit."""
    differs = (got - want).abs() > 1e-5
    assert differs.float().mean() < 0.002
    torch.testing.assert_close(got, want, rtol=0, atol=want.abs().max().item() / 7)


def bytes_of(path, name):
    tensor = GgufFile.open(path).tensors[name]
    return path.read_bytes()[tensor.offset_bytes :][: tensor.num_bytes]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("chunk", [2**20, 640])
def test_the_delta_is_added_and_all_else_copied(tmp_path, model_type, chunk, monkeypatch):
    monkeypatch.setattr("loram_cli.export.gguf_file.CHUNK_ELEMENTS", chunk)
    model, base, adapter = made(tmp_path, model_type)
    out = tmp_path / "merged.gguf"
    plan = run(adapter, base, out)
    assert plan.touched == len(adapter.pairs)
    before, after, deltas = gguf_weights(model), weights_of(out), updates(model, adapter)
    assert [*before] == [*after]
    for name, weight in before.items():
        if name in deltas:
            torch.testing.assert_close(after[name], weight + deltas[name])
            assert not torch.equal(after[name], weight)
        else:
            assert bytes_of(out, name) == bytes_of(base, name)
    # Types and places did not change either, so that the whole header is the same.
    start = GgufFile.open(base).tensors["token_embd.weight"].offset_bytes
    assert out.read_bytes()[:start] == base.read_bytes()[:start]


@pytest.mark.parametrize("kind", WRITABLE)
@pytest.mark.parametrize("own", [Type.F16, Type.Q4_1], ids=lambda k: k.name)
def test_touched_tensors_get_the_type_asked_for(tmp_path, kind, own):
    metadata = {"general__file_type": 3}
    model, base, adapter = made(tmp_path, kind=own, metadata=metadata)
    out = tmp_path / "merged.gguf"
    run(adapter, base, out, kind=kind)
    new = WRITABLE[kind]
    before, after, deltas = gguf_weights(model), weights_of(out), updates(model, adapter)
    file, theirs = GgufFile.open(out), GGUFReader(out)
    for name, weight in before.items():
        if name in deltas:
            want = through(through(weight, own) + deltas[name], new)
            assert file.tensors[name].kind == new
            assert_stored(after[name], want)
        else:
            assert file.tensors[name].kind == GgufFile.open(base).tensors[name].kind
            assert bytes_of(out, name) == bytes_of(base, name)
    assert file.value("tokenizer.chat_template") == TEMPLATE
    assert theirs.fields["tokenizer.ggml.tokens"].contents() == TOKENS
    assert theirs.fields["general.file_type"].contents() == {
        "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q4_0": 2, "q4_1": 3,
    }[kind]  # fmt: skip
    added = {"general.quantization_version"} if kind.startswith("q") else set()
    assert {*file.fields} - {*GgufFile.open(base).fields} == added
    # llama.cpp wants every tensor aligned, and the next one right behind it.
    assert all(t.offset_bytes % 32 == 0 for t in file.tensors.values())
    assert out.stat().st_size == max(
        -(-(t.offset_bytes + t.num_bytes) // 32) * 32 for t in file.tensors.values()
    )


@pytest.mark.parametrize("own", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0])
def test_without_a_type_each_tensor_keeps_its_own(tmp_path, own):
    model, base, adapter = made(tmp_path, kind=own)
    run(adapter, base, tmp_path / "merged.gguf")
    before, after = gguf_weights(model), weights_of(tmp_path / "merged.gguf")
    assert GgufFile.open(tmp_path / "merged.gguf").metadata() == GgufFile.open(base).metadata()
    for name, delta in updates(model, adapter).items():
        assert_stored(after[name], through(through(before[name], own) + delta, own))


def test_another_alignment_is_kept(tmp_path):
    _, base, adapter = made(tmp_path)
    wide = rewrite(base, tmp_path / "wide.gguf", alignment=256)
    out = tmp_path / "merged.gguf"
    run(adapter, wide, out, kind="q4_0")
    merged = GgufFile.open(out)
    assert all(t.offset_bytes % 256 == 0 for t in merged.tensors.values())
    assert any(t.num_bytes % 256 for t in merged.tensors.values())
    assert bytes_of(out, "token_embd.weight") == bytes_of(base, "token_embd.weight")
    assert [t.name for t in GGUFReader(out).tensors] == [*merged.tensors]


class Ears(NullReporter):
    def __init__(self):
        self.warnings = []

    def warn(self, line):
        self.warnings.append(line)


@pytest.mark.parametrize(
    ("own", "kind", "least", "most"),
    [
        (Type.F32, None, 0.999, 1.001),
        (Type.F16, "q4_0", 0.5, 1.5),
        (Type.Q4_0, "f16", 0.99, 1.01),
        (Type.Q4_0, None, -0.5, 0.5),
    ],
)
def test_an_update_smaller_than_the_steps_of_the_base_is_rounded_away(
    tmp_path, own, kind, least, most
):
    _, base, adapter = made(tmp_path, kind=own)
    small = {m: LoraPair(p.lora_a, p.lora_b / 40) for m, p in adapter.pairs.items()}
    adapter = LoraAdapter(adapter.config, small)
    ears, out = Ears(), tmp_path / "merged.gguf"
    told = merge(adapter, plan_merge(adapter, base, out, kind=kind), out, ears)
    assert least < told.kept_share < most
    if own == Type.Q4_0 and kind is None:
        [warning] = ears.warnings
        assert f"only {told.kept_share:.0%} of the update is left" in warning
    if 1 < most < 1.1:
        assert not ears.warnings


def test_an_adapter_of_zeros_loses_nothing(tmp_path):
    _, base, adapter = made(tmp_path)
    zero = {m: LoraPair(p.lora_a, p.lora_b * 0) for m, p in adapter.pairs.items()}
    adapter = LoraAdapter(adapter.config, zero)
    out = tmp_path / "merged.gguf"
    assert merge(adapter, plan_merge(adapter, base, out), out, NullReporter()).kept_share == 1.0
    assert out.read_bytes() == base.read_bytes()


def test_a_tied_head_gets_a_tensor_of_its_own(tmp_path):
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    base = write_gguf(model, tmp_path / "base.gguf", Type.F16)
    adapter = LoraAdapter.read(make_adapter(model, tmp_path / "adapter"))
    assert "output.weight" not in GgufFile.open(base).tensors
    run(adapter, base, tmp_path / "merged.gguf", kind="f32")
    after = weights_of(tmp_path / "merged.gguf")
    embedding = gguf_weights(model)["token_embd.weight"]
    pair = adapter.pairs["lm_head"]
    want = embedding.half().float() + adapter.scaling("lm_head") * pair.lora_b @ pair.lora_a
    torch.testing.assert_close(after["output.weight"], want)
    assert bytes_of(tmp_path / "merged.gguf", "token_embd.weight") == bytes_of(
        base, "token_embd.weight"
    )


def test_a_modelfile_lies_beside_it(tmp_path):
    _, base, adapter = made(tmp_path)
    run(adapter, base, tmp_path / "Merged.gguf")
    text = (tmp_path / "Merged.Modelfile").read_text()
    assert text == (
        "# ollama create merged -f Merged.Modelfile && ollama run merged\nFROM ./Merged.gguf\n"
    )


def test_without_a_chat_template_the_modelfile_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("gguf.GGUFWriter.add_chat_template", lambda self, text: None)
    _, base, adapter = made(tmp_path)
    run(adapter, base, tmp_path / "merged.gguf")
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "merged.Modelfile").read_text()


def refused(adapter, base, out, match, **how):
    with pytest.raises(LoramError, match=match) as error:
        run(adapter, base, out, **how)
    assert not out.exists()
    return error.value


def test_what_does_not_fit_is_refused_before_a_weight_is_read(tmp_path):
    model, base, adapter = made(tmp_path)
    out = tmp_path / "merged.gguf"
    other = make_model(tmp_path / "other", intermediate_size=128)
    file = write_gguf(other, tmp_path / "other.gguf")
    refused(adapter, file, out, r"mlp\.down_proj is 64 x 96, the weight in .* 64 x 128")
    shallow = write_gguf(
        make_model(tmp_path / "shallow", num_hidden_layers=1), tmp_path / "shallow.gguf"
    )
    refused(adapter, shallow, out, r"module model\.layers\.1\.\S+: no such tensor .* 1 layers")
    fused = write_gguf(make_model(tmp_path / "fused", "phi3"), tmp_path / "fused.gguf")
    refused(adapter, fused, out, r"module model\.layers\.0\.\S+: no such tensor")
    part = write_gguf(model, tmp_path / "part.gguf", split__count=3)
    assert "llama-gguf-split" in refused(adapter, part, out, "is one part of 3").hint
    lora = write_gguf(model, tmp_path / "lora.gguf", general__type="adapter")
    refused(adapter, lora, out, "holds a adapter, expected a model")
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(base.read_bytes().replace(b"llama", b"other"))
    refused(adapter, unknown, out, "architecture 'other' is not a known family")
    missing = base.read_bytes().replace(b"llama.block_count", b"llama.block_other")
    unknown.write_bytes(missing)
    refused(adapter, unknown, out, r"no llama\.block_count in its metadata")


def test_a_tensor_that_the_file_lacks_is_named(tmp_path):
    _, base, adapter = made(tmp_path)
    lacking = tmp_path / "lacking.gguf"
    lacking.write_bytes(base.read_bytes().replace(b"blk.1.ffn_up.", b"blk.1.ffn_xx."))
    refused(adapter, lacking, tmp_path / "m.gguf", r"has no tensor blk\.1\.ffn_up\.weight")


def test_types_that_cannot_be_written_are_refused_with_those_that_can(tmp_path):
    model, _, adapter = made(tmp_path, hidden_size=256, intermediate_size=256, head_dim=64)
    base = write_gguf(model, tmp_path / "f32.gguf")
    matrices = [n for n, t in GgufFile.open(base).tensors.items() if len(t.shape) == 2]
    zeros = {name: Type.Q4_K for name in matrices if "ffn" in name}
    q4_k = rewrite(base, tmp_path / "q4_k.gguf", zeros=zeros)
    error = refused(
        adapter, q4_k, tmp_path / "m.gguf", r"tensor blk\.0\.ffn_down\.weight: its type Q4_K"
    )
    assert "q8_0, q5_1, q5_0, q4_1, q4_0" in error.hint
    run(adapter, q4_k, tmp_path / "m.gguf", kind="q8_0")
    want = updates(model, adapter)["blk.0.ffn_up.weight"]
    after = weights_of(tmp_path / "m.gguf")["blk.0.ffn_up.weight"]
    torch.testing.assert_close(after, through(want, Type.Q8_0))


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path):
    _, base, adapter = made(tmp_path, intermediate_size=80)
    error = refused(adapter, base, tmp_path / "m.gguf", "rows of 80 are no multiple", kind="q4_0")
    assert isinstance(error, UsageError)


def test_unknown_types_and_existing_outputs_are_usage_errors(tmp_path):
    _, base, adapter = made(tmp_path)
    with pytest.raises(UsageError, match="unknown GGUF type 'q4_k_m'"):
        plan_merge(adapter, base, tmp_path / "m.gguf", kind="q4_k_m")
    (tmp_path / "m.Modelfile").write_text("mine")
    with pytest.raises(UsageError, match=r"m\.Modelfile: exists"):
        plan_merge(adapter, base, tmp_path / "m.gguf")
    with pytest.raises(LoramError, match="is the base itself"):
        plan_merge(adapter, base, base, force=True)
    with pytest.raises(UsageError, match=r"m\.Modelfile: exists and is not an output of loram"):
        plan_merge(adapter, base, tmp_path / "m.gguf", force=True)
    (tmp_path / "m.Modelfile").unlink()
    run(adapter, base, tmp_path / "m.gguf")
    assert "FROM ./m.gguf" in (tmp_path / "m.Modelfile").read_text()
    run(adapter, base, tmp_path / "m.gguf", force=True)
    (tmp_path / "m.gguf").unlink()  # as where a merge was killed between the two
    run(adapter, base, tmp_path / "m.gguf")


def test_a_model_of_others_is_not_replaced(tmp_path):
    _, base, adapter = made(tmp_path)
    other = shutil.copyfile(base, tmp_path / "other.gguf")
    (tmp_path / "other.Modelfile").write_text("FROM ./other.gguf\n")
    with pytest.raises(UsageError, match="is not an output of loram"):
        plan_merge(adapter, base, other, force=True)


def test_nan_in_the_base_leaves_nothing_behind(tmp_path):
    _, base, adapter = made(tmp_path)
    tensor = GgufFile.open(base).tensors["blk.1.attn_v.weight"]
    raw = bytearray(base.read_bytes())
    struct.pack_into("<f", raw, tensor.offset_bytes + 40, float("nan"))
    base.write_bytes(raw)
    refused(adapter, base, tmp_path / "m.gguf", r"tensor blk\.1\.attn_v\.weight: NaN")
    assert {p.name for p in tmp_path.iterdir()} == {"model", "adapter", "base.gguf"}


def test_head_counts_that_make_no_sense_are_refused(tmp_path):
    _, base, adapter = made(tmp_path)
    field = GgufFile.open(base).fields["llama.attention.head_count_kv"]
    raw = bytearray(base.read_bytes())
    struct.pack_into("<I", raw, field.offset_bytes, 0)
    base.write_bytes(raw)
    refused(adapter, base, tmp_path / "m.gguf", "states head counts 0")
