"""Single weights zeroed: prune, align, train, recover, and zeros that stay zeros."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_base
from helpers.variants import VARIANTS, mostly_slow
from safetensors.torch import load_file

from loram_cli import pipeline
from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.index import read_config
from loram_cli.checkpoint.model import Model
from loram_cli.config import defaults as resolve
from loram_cli.config.recipe import Recipe
from loram_cli.errors import LoramError, UsageError
from loram_cli.modeling.load import load_causal_lm
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest
from loram_cli.runs.rundir import DEMO_MODEL, RunDirectory
from loram_cli.stages.align import stage as align
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.train import stage as train
from loram_cli.tools import memory_report as report

SILENT = NullReporter()
# The first of each type: its modules, fused or not, are the family's.
ONE_OF_EACH = list({v.model_type: v for v in reversed(VARIANTS)}.values())


def prune_spec(base: Path, out: Path, text: Path | None = None, **changes: object):
    settings = {"strategy": "unst", "ratio": 0.5}
    if text is not None:
        settings |= {"calibration": str(text), "calibration_samples": 12, "calibration_length": 32}
    return prune.PruneSpec(model=base, out=out, **{**settings, **changes})


def linears(directory: Path) -> dict[str, torch.Tensor]:
    config = read_config(directory)
    names = family_for(config, "here").linear_names(config)
    tensors = load_file(directory / "model.safetensors")
    return {name: tensors[name] for name in names}


def align_spec(source: Path, out: Path, text: Path, **changes: object) -> align.AlignSpec:
    settings = {"steps": 3, "batch": 4, "block_length": 32, "learning_rate": 1e-2}
    return align.AlignSpec(source=source, out=out, data=str(text), **{**settings, **changes})


@pytest.fixture(scope="module", params=["unst", "semi"])
def chain(request, base: Path, text_file: Path, instructions: Path, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp(request.param)
    prune.run(prune_spec(base, run / "pruned", text_file, strategy=request.param), SILENT)
    align.run(align_spec(run / "pruned", run / "aligned", text_file), SILENT)
    spec = train.TrainSpec(
        source=run / "aligned", out=run / "adapter", data=str(instructions), steps=2, batch=4,
        micro_batch=2, learning_rate=1e-2, warmup_steps=0, max_length=64, eval_examples=4,
    )  # fmt: skip
    train.run(spec, SILENT)
    places = {"adapter": run / "adapter", "model": base, "out": run / "recovered"}
    recover.run(recover.RecoverSpec(**places), SILENT)
    return run


def test_half_of_every_decoder_linear_is_zero_and_the_rest_is_the_base(chain: Path, base: Path):
    manifest = Manifest.read(chain / "pruned")
    zeros = 0
    for weight in linears(chain / "pruned").values():
        assert int((weight == 0).sum()) == weight.numel() // 2
        zeros += weight.numel() // 2
        if manifest.spec["strategy"] == "semi":
            assert ((weight.reshape(-1, 4) == 0).sum(dim=1) == 2).all()
    assert manifest.results["zeros"] == manifest.sparsity["zeros"] == zeros
    before, after = (load_file(d / "model.safetensors") for d in (base, chain / "pruned"))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    others = set(before) - set(linears(base))
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert json.loads((chain / "pruned" / "config.json").read_text()) == read_config(base)
    total = sum(tensor.numel() for tensor in before.values())
    assert manifest.results["pruned_params"] == total - zeros
    assert not (chain / "pruned" / "activations").exists()


def test_alignment_moves_live_weights_and_no_zero(chain: Path):
    pruned, aligned = linears(chain / "pruned"), linears(chain / "aligned")
    for name, weight in pruned.items():
        assert torch.equal(weight == 0, aligned[name] == 0)
        assert not torch.equal(weight, aligned[name])
    record = Manifest.read(chain / "aligned")
    assert record.sparsity == Manifest.read(chain / "pruned").sparsity
    assert record.results["zeros"] == record.sparsity["zeros"]


def test_without_the_mask_zeros_would_be_lost(chain, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("loram_cli.training.loop.loop.keep_zeros", lambda model, names: [])
    with pytest.raises(LoramError, match="no longer zero after training"):
        align.run(align_spec(chain / "pruned", tmp_path / "x", text_file), SILENT)
    assert not (tmp_path / "x").exists()


def test_memory_report_counts_what_is_not_zero(chain: Path, base: Path):
    for name in ("pruned", "aligned"):
        result = report.run(
            report.MemoryReportSpec(model=base, pruned=chain / name, rank=2), SILENT
        )
        full, _, sparse, _ = result.rows
        assert sparse.params == Manifest.read(chain / "pruned").results["pruned_params"]
        assert sparse.params < full.params == sparse.stored_params
        assert sparse.weight_bytes == full.weight_bytes
        assert [note for note in result.notes if "counted in the weights" in note]


def test_the_mask_outlives_an_interruption(chain, text_file, tmp_path, monkeypatch):
    if chain.name.startswith("semi"):
        pytest.skip("the mask is kept alike for both; once is enough")
    changes = {"steps": 4, "save_steps": 2}
    align.run(align_spec(chain / "pruned", tmp_path / "whole", text_file, **changes), SILENT)

    class Stop(Exception):
        pass

    cut = align_spec(chain / "pruned", tmp_path / "cut", text_file, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(
            "loram_cli.training.loop.trainer.StepCallback.on_step_end", fail_after(2, Stop)
        )
        with pytest.raises(Stop):
            align.run(cut, SILENT)
    align.run(cut, SILENT)
    whole, resumed = linears(tmp_path / "whole"), linears(tmp_path / "cut")
    for name, weight in linears(chain / "pruned").items():
        assert torch.equal(resumed[name] == 0, weight == 0)
        torch.testing.assert_close(resumed[name], whole[name], rtol=1e-5, atol=1e-7)


def fail_after(steps: int, error: type[Exception]):
    from loram_cli.training.loop.trainer import StepCallback

    original = StepCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > steps:
            raise error
        return original(self, args, state, control, **kwargs)

    return on_step_end


def test_recovery_passes_the_factors_through(chain: Path, base: Path):
    small = load_file(chain / "adapter" / "adapter_model.safetensors")
    full = load_file(chain / "recovered" / "adapter_model.safetensors")
    assert small.keys() == full.keys()
    assert all(torch.equal(small[name], full[name]) for name in small)
    record = Manifest.read(chain / "recovered")
    assert record.sparsity["strategy"] in ("unst", "semi")
    assert record.results["small_params"] == record.results["full_params"]


def test_recovery_for_another_base_is_refused(chain: Path, tmp_path: Path):
    other = make_base(tmp_path / "other", seed=5)
    places = {"adapter": chain / "adapter", "model": other, "out": tmp_path / "x"}
    with pytest.raises(LoramError, match="weights differ"):
        recover.run(recover.RecoverSpec(**places), SILENT)


def test_a_sparse_model_is_not_pruned_again(chain: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="is pruned already"):
        prune.run(prune_spec(chain / "aligned", tmp_path / "x", importance="l2"), SILENT)


@pytest.mark.parametrize("strategy", ["unst", "semi"])
def test_magnitude_keeps_the_largest(base: Path, tmp_path: Path, strategy: str):
    prune.run(prune_spec(base, tmp_path / "p", strategy=strategy, importance="l2"), SILENT)
    before = linears(base)
    for name, weight in linears(tmp_path / "p").items():
        gone = weight == 0
        assert torch.equal(weight[~gone], before[name][~gone])
        if strategy == "unst":
            assert before[name][gone].abs().max() <= before[name][~gone].abs().min()


def test_activations_on_disk_change_no_byte(base: Path, text_file: Path, tmp_path: Path):
    spec = prune_spec(base, tmp_path / "a", text_file)
    prune.run(spec, SILENT)
    prune.run(prune_spec(base, tmp_path / "b", text_file, calibration_memory=0), SILENT)
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert a == b


@mostly_slow(ONE_OF_EACH)
def test_the_plan_tells_the_memory_of_the_hessians_that_are_summed(
    variant, text_file, tmp_path, monkeypatch
):
    """What shares an input is told from the family file, and seen in the running model."""
    from loram_cli.modeling.layerwise import sparsegpt_pass as reconstruction
    from loram_cli.pruning.sparsegpt import working_bytes

    summed = []

    class Counted(reconstruction._LayerInputs):
        def __init__(self, layer, modules, device):
            super().__init__(layer, modules, device)
            self.rows = {n: len(layer.module.get_submodule(n).weight) for n in modules}

        def take(self):
            summed.append(
                [
                    (len(hessian.total), max(self.rows[name] for name in self._sharing[owner]))
                    for owner, hessian in self._hessians.items()
                ]
            )
            return super().take()

    monkeypatch.setattr(reconstruction, "_LayerInputs", Counted)
    base = variant.save(tmp_path / "base")
    spec = prune_spec(base, tmp_path / "pruned", text_file)
    needs = prune.plan(spec, SILENT).work.calibration
    assert needs.figures().hessian_memory_bytes == needs.hessian_bytes
    prune.run(spec, SILENT)
    assert len(summed) == Model.open(base).num_layers
    used = max(map(working_bytes, summed))
    # More only by what is counted twice: the hidden state of attention and MLP in parallel.
    assert 0 < used <= needs.hessian_bytes <= 1.5 * used


def test_sparsegpt_keeps_the_function_closer_than_magnitude(base, text_file, tmp_path):
    prune.run(prune_spec(base, tmp_path / "s", text_file, ratio=0.7), SILENT)
    prune.run(prune_spec(base, tmp_path / "m", ratio=0.7, importance="l2"), SILENT)
    text = text_file.read_bytes()[:200]
    ids = torch.tensor([[byte % 250 + 2 for byte in text]])
    with torch.no_grad():
        full, sparse, magnitude = (
            load_causal_lm(path)(ids).logits for path in (base, tmp_path / "s", tmp_path / "m")
        )
    assert (sparse - full).norm() < (magnitude - full).norm()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy": "semi", "ratio": 0.6}, "2:4 zeroes two of every four"),
        ({"importance": "taylor"}, "does not go with --strategy unst"),
        ({"strategy": "stru", "importance": "sparsegpt"}, "it takes taylor or l2"),
        ({"calibration": None}, "no --calibration is given"),
        ({"block_columns": 6, "strategy": "semi"}, "multiple of 4"),
        ({"dampening": -1.0}, "--dampening"),
    ],
)
def test_what_does_not_go_together(changes, said, tmp_path):
    settings = {"calibration": "text.txt", **changes}
    with pytest.raises(UsageError, match=said):
        prune_spec(tmp_path, tmp_path / "out", **settings)


def test_widths_that_2_4_does_not_fit(tmp_path: Path):
    odd = make_base(tmp_path / "odd", intermediate_size=42)
    with pytest.raises(UsageError, match=r"down_proj\.weight has 42 columns"):
        prune.plan(prune_spec(odd, tmp_path / "p", strategy="semi", importance="l2"), SILENT)


def test_too_little_text_and_too_long_windows(base: Path, text_file: Path, tmp_path: Path):
    with pytest.raises(LoramError, match="lower --calibration-samples"):
        prune.run(prune_spec(base, tmp_path / "p", text_file, calibration_samples=5000), SILENT)
    with pytest.raises(UsageError, match="exceeds the model's 256 positions"):
        prune.plan(prune_spec(base, tmp_path / "p", text_file, calibration_length=300), SILENT)
    with pytest.raises(LoramError, match="no such file"):
        prune.plan(prune_spec(base, tmp_path / "p", calibration=str(tmp_path / "none.txt")), SILENT)
    assert not (tmp_path / "p").exists()


def test_flags_fill_in_what_the_strategy_settles(base: Path, tmp_path: Path):
    run = RunDirectory(tmp_path / "run")
    semi = resolve.prune_spec(
        resolve.Place(run, str(base)), {"strategy": "semi", "importance": "l2"}
    )
    assert semi.settled().ratio == 0.5
    demo = resolve.prune_spec(resolve.Place(run, DEMO_MODEL), {"strategy": "unst"})
    assert (demo.ratio, demo.calibration, demo.method) == (0.5, "demo:corpus", "sparsegpt")
    with pytest.raises(UsageError, match="--keep-first does not go with --strategy unst"):
        resolve.prune_spec(resolve.Place(run, DEMO_MODEL), {"strategy": "unst", "keep_first": 2})


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["unst", "semi"])
@pytest.mark.parametrize("model", ["demo", "tiny"])
def test_the_whole_chain_by_recipe(model, strategy, base, text_file, instructions, tmp_path):
    """Prune, align, train, recover, merge and eval; each row of the comparison has its figure."""
    on_demo = model == "demo"
    fit = {"steps": 3, "batch": 4, "micro_batch": 4, "warmup_steps": 0}
    recipe = Recipe(
        model="demo" if on_demo else str(base),
        prune={
            "strategy": strategy,
            "ratio": 0.5,
            "calibration": "demo:calibration" if on_demo else str(text_file),
            "calibration_samples": 16,
            "calibration_length": 64,
        },
        align={**fit, "data": "demo:corpus" if on_demo else str(text_file), "block_length": 64},
        train={**fit, "data": "demo:train" if on_demo else str(instructions), "max_length": 128},
        recover={"merge": True},
        eval={
            "tasks": ["perplexity"],
            "limit": 20,
            "task_data": {} if on_demo else {"perplexity": str(instructions)},
        },
    )
    run = RunDirectory(tmp_path / "run")
    plan = pipeline.plan(recipe, run, SILENT)[0].figures["result"]
    results = pipeline.run(recipe, run, force=False, reporter=SILENT, on_result=lambda _: None)
    assert [r.stage for r in results] == ["prune", "align", "train", "recover", "merge", "eval"]
    assert results[0].manifest.results["pruned_params"] == plan.pruned_params
    rows = results[-1].manifest.results["rows"]
    assert {"base", "pruned", "recovered"} <= set(rows)
    assert all(row["scores"][0]["value"] > 1 for row in rows.values())
    again = pipeline.run(recipe, run, force=False, reporter=SILENT, on_result=lambda _: None)
    assert not any(result.fresh for result in again)
