import pytest
import torch
from gguf import GGMLQuantizationType as Type
from helpers.gguf_files import TEMPLATE, TOKENS, make_model, through, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from loram_cli.errors import LoramError, UsageError
from loram_cli.export.gguf_import import RECORD_NAME, import_gguf
from loram_cli.reporting import NullReporter

pytestmark = pytest.mark.integration


class Ears(NullReporter):
    def __init__(self):
        self.warnings = []

    def warn(self, line):
        self.warnings.append(line)


def made(tmp_path, kind, model_type="llama", **metadata):
    # transformers' reader takes Qwen3's default for the width of a head whatever the file says.
    changes = {"head_dim": 128} if model_type == "qwen3" else {}
    model = make_model(tmp_path / "model", model_type, vocab_size=len(TOKENS), **changes)
    return model, write_gguf(model, tmp_path / "base.gguf", kind, **metadata)


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_the_model_comes_back_with_its_tokenizer(tmp_path, model_type, capfd):
    model, base = made(tmp_path, Type.F32, model_type)
    ears = Ears()
    capfd.readouterr()
    told = import_gguf(base, tmp_path / "out", ears)
    assert (told.family, told.dtype, told.quantized) == (model_type, "float32", {})
    assert not ears.warnings
    assert capfd.readouterr() == ("", "")
    want, got = weights(model), weights(told.path)
    assert want.keys() == got.keys()
    for name, weight in want.items():
        assert torch.equal(weight, got[name]), name
    tokenizer = AutoTokenizer.from_pretrained(told.path)
    assert tokenizer.decode(tokenizer("then").input_ids) == "then"
    assert tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Type.F16, "float16"), (Type.BF16, "bfloat16"), (Type.Q8_0, "bfloat16")]
)
def test_weights_have_the_files_type_or_bfloat16(tmp_path, kind, dtype):
    _, base = made(tmp_path, kind)
    assert import_gguf(base, tmp_path / "out", NullReporter()).dtype == dtype
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == getattr(torch, dtype)


def test_a_quantized_file_is_warned_about(tmp_path):
    model, base = made(tmp_path, Type.Q4_0)
    ears = Ears()
    told = import_gguf(base, tmp_path / "out", ears, dtype="float32")
    [warning] = ears.warnings
    assert "16 of 16 in Q4_0" in warning
    assert told.quantized == {"Q4_0": 16}
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(weights(told.path)[name], through(weights(model)[name], Type.Q4_0))


def test_rotary_scaling_that_the_reader_leaves_out_is_warned_about(tmp_path):
    _, base = made(tmp_path, Type.F32, llama__rope__scaling__type="linear")
    ears = Ears()
    import_gguf(base, tmp_path / "out", ears)
    [warning] = ears.warnings
    assert "scales its rotary frequencies" in warning


def test_only_what_an_import_wrote_is_replaced(tmp_path):
    _, base = made(tmp_path, Type.F32)
    out, mine = tmp_path / "out", tmp_path / "out" / "mine"
    import_gguf(base, out, NullReporter())
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1
    with pytest.raises(UsageError, match="exists\npass --force"):
        import_gguf(base, out, NullReporter())
    import_gguf(base, out, NullReporter(), force=True)
    assert not list(tmp_path.glob(".*"))
    mine.write_text("years of work")
    for others in (RECORD_NAME, "config.json"):
        with pytest.raises(UsageError, match="is not an output of loram"):
            import_gguf(base, out, NullReporter(), force=True)
        assert mine.exists()
        (out / others).unlink()
    (tmp_path / ".new.partial").symlink_to(out)
    with pytest.raises(UsageError, match="is a symbolic link"):
        import_gguf(base, tmp_path / "new", NullReporter())
    assert mine.exists()
    with pytest.raises(UsageError, match="is a file"):
        import_gguf(base, base, NullReporter(), force=True)


def test_what_cannot_be_read_leaves_nothing_behind(tmp_path):
    _, base = made(tmp_path, Type.F32)
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        import_gguf(base, tmp_path / "out", NullReporter(), dtype="int8")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(base.read_bytes().replace(b"tokenizer.ggml.model", b"tokenizer.ggml.xxxxx"))
    with pytest.raises(LoramError, match=r"broken\.gguf: transformers cannot read it"):
        import_gguf(broken, tmp_path / "out", NullReporter())
    broken.write_bytes(base.read_bytes().replace(b"blk.1.ffn_up.", b"blk.1.ffn_xx."))
    with pytest.raises(LoramError, match=r"1 tensors are missing, such as \S+1\.mlp\.up_proj"):
        import_gguf(broken, tmp_path / "out", NullReporter())
    assert {p.name for p in tmp_path.iterdir()} == {"model", "base.gguf", "broken.gguf"}
