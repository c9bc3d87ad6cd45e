"""Alignment by reconstruction, distillation and their chains; pre-training is in test_chain."""

from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from helpers.reporters import WarningRecorder
from helpers.tiny_models import make_base
from safetensors.torch import load_file

from loram_cli.errors import LoramError, UsageError
from loram_cli.modeling.load import load_causal_lm, load_tokenizer
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest
from loram_cli.runs.whole import damage
from loram_cli.stages.align import stage as align
from loram_cli.stages.align.methods import reconstruct
from loram_cli.stages.align.methods.table import METHODS
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.train import stage as train

pytestmark = pytest.mark.integration

SILENT = NullReporter()
KEEP = {"keep_first": 1, "keep_last": 1}
DEMO = Path(str(resources.files("loram_cli.demo") / "base"))


def prune_half(base: Path, out: Path) -> Path:
    prune.run(prune.PruneSpec(model=base, out=out, ratio=0.5, strategy="rand", **KEEP), SILENT)
    return out


@pytest.fixture(scope="module")
def pruned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune_half(base, tmp_path_factory.mktemp("pruned") / "pruned")


def align_spec(source: Path, out: Path, data: Path | str, **changes: object) -> align.AlignSpec:
    settings = {"steps": 3, "batch": 4, "block_length": 32, "learning_rate": 1e-3}
    settings |= {"calibration_samples": 40, "eval_rows": 8, "warmup_steps": 0, "eval_steps": 2}
    return align.AlignSpec(source=source, out=out, data=str(data), **{**settings, **changes})


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_reconstruction_helps_the_demo_base_without_a_gradient_step(tmp_path: Path):
    pruning = {"strategy": "stru", "importance": "l2", "ratio": 0.85}
    prune.run(prune.PruneSpec(model=DEMO, out=tmp_path / "pruned", **pruning), SILENT)
    spec = align_spec(
        tmp_path / "pruned", tmp_path / "aligned", "demo:corpus",
        method=("reconstruct",), block_length=64, calibration_samples=64,
    )  # fmt: skip
    results = align.run(spec, SILENT).manifest.results
    assert results["steps"] == 0
    assert results["eval_loss_after"] < results["eval_loss_before"] - 0.1
    assert all(after < before for before, after in results["layer_errors"].values())
    assert {t.dtype for t in tensors(tmp_path / "aligned").values()} == {torch.bfloat16}
    load_causal_lm(tmp_path / "aligned")


def test_only_the_outputs_of_pruned_layers_move(pruned, base, text_file, tmp_path):
    spec = align_spec(pruned, tmp_path / "aligned", text_file, method=("reconstruct",))
    result = align.run(spec, SILENT)
    before, after = tensors(pruned), tensors(tmp_path / "aligned")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        f"model.layers.{i}.{name}.weight"
        for i in (1, 2)
        for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    made_from, made = Manifest.read(pruned), result.manifest
    assert (made.base, made.keep) == (made_from.base, made_from.keep)
    assert {p.name for p in (tmp_path / "aligned").iterdir()} == {
        p.name for p in pruned.iterdir() if p.name != "kept.png"
    }
    assert not align.run(spec, SILENT).fresh


def test_block_steps_move_the_whole_layer_and_lower_its_error(pruned, text_file, tmp_path):
    errors = {}
    for name, steps in (("closed", 0), ("stepped", 20)):
        spec = align_spec(
            pruned, tmp_path / name, text_file, method=("reconstruct",), block_steps=steps
        )
        errors[name] = align.run(spec, SILENT).manifest.results["layer_errors"]["1"][1]
    assert errors["stepped"] < 0.9 * errors["closed"]
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(tensors(pruned)[name], tensors(tmp_path / "stepped")[name])


def test_a_chain_of_methods_trains_and_recovers(pruned, base, text_file, instructions, tmp_path):
    methods = ("reconstruct", "distill", "pretrain")
    spec = align_spec(pruned, tmp_path / "aligned", text_file, method=methods)
    results = align.run(spec, SILENT).manifest.results
    assert results["method"] == list(methods)
    first, second, third = results["chain"]
    assert first["eval_loss_after"] == pytest.approx(second["eval_loss_before"], abs=2e-3)
    assert second["eval_loss_after"] == pytest.approx(third["eval_loss_before"], abs=2e-3)
    assert results["eval_loss_before"] == first["eval_loss_before"]
    assert not (tmp_path / "aligned" / "methods").exists()
    training = train.TrainSpec(
        source=tmp_path / "aligned", out=tmp_path / "adapter", data=str(instructions), steps=2,
        batch=4, learning_rate=1e-2, warmup_steps=0, max_length=64,
    )  # fmt: skip
    train.run(training, SILENT)
    places = {"adapter": tmp_path / "adapter", "model": base, "out": tmp_path / "recovered"}
    recover.run(recover.RecoverSpec(**places), SILENT)


def test_an_interrupted_chain_goes_on_to_the_same_model(pruned, text_file, tmp_path, monkeypatch):
    changes = {"method": ("reconstruct", "pretrain")}
    align.run(align_spec(pruned, tmp_path / "whole", text_file, **changes), SILENT)
    cut = align_spec(pruned, tmp_path / "cut", text_file, **changes)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    write, written = reconstruct._write_fit, []

    def write_one(fit, folder):
        if written:
            raise KeyboardInterrupt
        written.append(folder)
        write(fit, folder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reconstruct, "_write_fit", write_one)
        align.run(cut, SILENT)
    assert damage(written[0]) is None
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(METHODS, "pretrain", replace(METHODS["pretrain"], act=stop))
        align.run(cut, SILENT)
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "reconstruct", replace(METHODS["reconstruct"], act=stop))
        align.run(cut, SILENT)
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_damaged_work_of_an_interrupted_chain_is_done_again(
    pruned, text_file, tmp_path, monkeypatch
):
    changes = {"method": ("reconstruct", "pretrain")}
    align.run(align_spec(pruned, tmp_path / "whole", text_file, **changes), SILENT)
    cut = align_spec(pruned, tmp_path / "cut", text_file, **changes)
    done = tmp_path / ".cut.partial" / "methods" / "0-reconstruct"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reconstruct, "_write_checkpoint", stop)
        align.run(cut, SILENT)
    fitted = sorted((done / "fitted").iterdir())
    assert len(fitted) == 2
    flip(fitted[0] / "fit.safetensors")
    (fitted[1] / "whole").unlink()
    for _ in range(2):
        reporter = WarningRecorder()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setitem(METHODS, "pretrain", replace(METHODS["pretrain"], act=stop))
            align.run(cut, reporter)
        flip(done / "model.safetensors")
    assert "0-reconstruct: damaged, model.safetensors has changed" in reporter.warnings[-1]
    align.run(cut, SILENT)
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_distillation_comes_nearer_to_the_full_model(text_file, tmp_path):
    # Weights large enough that pruning changes what the model says.
    base = make_base(tmp_path / "base", initializer_range=0.2)
    pruned = prune_half(base, tmp_path / "pruned")
    spec = align_spec(pruned, tmp_path / "aligned", text_file, method=("distill",), steps=30)
    align.run(spec, SILENT)
    tokenizer = load_tokenizer(base)
    ids = tokenizer(["Line 7: the quick brown fox jumps"], return_tensors="pt")["input_ids"]

    def log_probabilities(directory: Path) -> torch.Tensor:
        with torch.no_grad():
            return load_causal_lm(directory)(ids).logits.log_softmax(-1)

    full = log_probabilities(base)
    far, near = (
        float((full.exp() * (full - log_probabilities(d))).sum(-1).mean())
        for d in (pruned, tmp_path / "aligned")
    )
    assert near < 0.9 * far


@pytest.mark.parametrize("method", ["distill", "pretrain"])
@pytest.mark.parametrize("trained", ["norms", "lora"])
def test_norms_or_factors_alone_are_trained(pruned, text_file, tmp_path, method, trained):
    spec = align_spec(pruned, tmp_path / "out", text_file, method=(method,), trained=trained)
    planned = align.plan(spec, SILENT)
    results = align.run(spec, SILENT).manifest.results
    assert results["trained_params"] == planned.figures["trained_params"]
    before, after = tensors(pruned), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {name for name, tensor in before.items() if tensor.dim() == 1}
    linears = {name for name in before.keys() - norms if ".layers." in name}
    assert moved == (norms if trained == "norms" else linears)
    if trained == "lora":
        name = "model.layers.1.mlp.up_proj.weight"
        update = (after[name] - before[name]).float()
        assert torch.linalg.matrix_rank(update, rtol=1e-3) <= 16
    # Of a model that is frozen, only what is trained has moments.
    all_of_it = align.plan(replace(spec, trained="all", out=tmp_path / "all"), SILENT)
    assert planned.memory_bytes < all_of_it.memory_bytes


def test_a_model_near_the_base_is_distilled_by_its_norms(text_file, tmp_path):
    base = make_base(tmp_path / "base", initializer_range=0.2)
    pruned = prune_half(base, tmp_path / "pruned")
    losses = {}
    for trained in ("norms", "lora"):
        spec = align_spec(
            pruned, tmp_path / trained, text_file, method=("pretrain",), trained=trained, steps=20,
            learning_rate=1e-2,
        )  # fmt: skip
        results = align.run(spec, SILENT).manifest.results
        losses[trained] = results["eval_loss_after"] - results["eval_loss_before"]
    assert max(losses.values()) < -0.05


def test_factors_are_not_merged_into_zeros_or_factors(base, text_file, tmp_path):
    ways = {"unst": {"ratio": 0.5, "importance": "l2"}, "lowrank": {"ratio": 0.5}}
    for strategy, settings in ways.items():
        calibration: dict[str, object] = {}
        if strategy == "lowrank":
            calibration = {"calibration": str(text_file), "calibration_samples": 8}
        spec = prune.PruneSpec(
            model=base, out=tmp_path / strategy, strategy=strategy, **settings, **calibration,
            **KEEP,
        )  # fmt: skip
        prune.run(spec, SILENT)
        how = align_spec(tmp_path / strategy, tmp_path / "x", text_file, trained="lora")
        with pytest.raises(UsageError, match="--trained lora: "):
            align.run(how, SILENT)
    with pytest.raises(UsageError, match="--trained lora does not go with --fsdp"):
        align_spec(tmp_path, tmp_path / "x", text_file, trained="lora", fsdp=True)
    with pytest.raises(UsageError, match="--train-lm-head does not go with --trained norms"):
        align_spec(tmp_path, tmp_path / "x", text_file, trained="norms", train_lm_head=True)


def test_all_but_the_head_is_trained_unless_asked(base, text_file, tmp_path):
    tied = make_base(tmp_path / "tied", tie_word_embeddings=True)
    for model, heads in ((base, {"lm_head.weight"}), (tied, {"model.embed_tokens.weight"})):
        pruned = prune_half(model, tmp_path / f"{model.name}-pruned")
        for trains_head in (False, True):
            out, reporter = tmp_path / f"{model.name}-{trains_head}", WarningRecorder()
            align.run(align_spec(pruned, out, text_file, train_lm_head=trains_head), reporter)
            told = any("embeddings are tied" in note for note in reporter.notes)
            assert told == (model is tied and not trains_head)
            before, after = tensors(pruned), tensors(out)
            kept = {name for name in before if torch.equal(before[name], after[name])}
            assert kept == (set() if trains_head else heads)


def test_zeroed_weights_stay_zero_in_distillation(base, text_file, tmp_path):
    sparse = tmp_path / "sparse"
    pruning = {"strategy": "unst", "ratio": 0.5, "importance": "l2"}
    prune.run(prune.PruneSpec(model=base, out=sparse, **pruning, **KEEP), SILENT)
    align.run(align_spec(sparse, tmp_path / "out", text_file, method=("distill",)), SILENT)
    name = "model.layers.1.mlp.up_proj.weight"
    before, after = (tensors(directory)[name] for directory in (sparse, tmp_path / "out"))
    assert torch.equal(after == 0, before == 0)
    assert not torch.equal(after, before)
    spec = align_spec(sparse, tmp_path / "x", text_file, method=("pretrain", "reconstruct"))
    with pytest.raises(UsageError, match="pruned by unst, whose zeros the closed form would fill"):
        align.run(spec, SILENT)


def test_the_base_is_checked(pruned, text_file, tmp_path):
    other = make_base(tmp_path / "other", seed=5)
    spec = align_spec(pruned, tmp_path / "x", text_file, method=("reconstruct",), model=other)
    with pytest.raises(LoramError, match="another base: weights differ"):
        align.run(spec, SILENT)
    gone = tmp_path / "gone"
    spec = align_spec(pruned, tmp_path / "x", text_file, method=("distill",), model=gone)
    with pytest.raises(LoramError, match="was pruned from is not there"):
        align.run(spec, SILENT)
    assert not (tmp_path / "x").exists()


def test_plans_tell_what_each_method_needs(pruned, base, text_file, tmp_path):
    plans = {
        method: align.plan(
            align_spec(pruned, tmp_path / "x", text_file, method=(method,)), SILENT, count=True
        )
        for method in ("reconstruct", "distill", "pretrain")
    }
    memory = {method: plan.memory_bytes for method, plan in plans.items()}
    assert memory["reconstruct"] < memory["pretrain"] < memory["distill"]
    assert plans["reconstruct"].disk_bytes < plans["pretrain"].disk_bytes
    assert "steps" not in plans["reconstruct"].figures
    assert plans["distill"].figures["steps"] == 3
    assert str(base) in plans["distill"].reads
    assert str(base) not in plans["pretrain"].reads
    assert not (tmp_path / "x").exists()


def test_methods_are_checked(tmp_path):
    for methods in ((), ("pretrain", "pretrain")):
        with pytest.raises(UsageError, match="each once"):
            align_spec(tmp_path, tmp_path / "x", "demo:corpus", method=methods)
    with pytest.raises(UsageError, match="--ridge cannot be negative"):
        align_spec(tmp_path, tmp_path / "x", "demo:corpus", ridge=-1.0)


def test_weights_of_sources_are_shares_of_the_tokens(pruned: Path, tmp_path: Path):
    """Documents of one source are forty times as long as the other's."""
    (tmp_path / "long.txt").write_text("\n\n\n".join(["a b c d " * 80] * 10))
    (tmp_path / "short.jsonl").write_text('{"text": "x y"}\n' * 900)
    data = f"{tmp_path / 'long.txt'}:0.25,{tmp_path / 'short.jsonl'}:0.75"
    rows = align._rows(align_spec(pruned, tmp_path / "out", data), SILENT)
    tokenizer = load_tokenizer(pruned)
    texts = [tokenizer.decode(row.input_ids) for row in rows]
    share = sum("x" in text for text in texts) / len(texts)
    assert len(rows) > 20
    assert 0.7 < share < 0.8
