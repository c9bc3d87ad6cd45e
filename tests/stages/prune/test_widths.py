"""Plans, budgets and global ranking: what they leave of a model, and that the rest goes on."""

import json
import math
from pathlib import Path

import pytest
import yaml
from helpers.recovery_chain import SILENT, check_training_and_recovery, keep_of
from helpers.slow import slow

from loram_cli import pipeline
from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.index import CheckpointIndex, read_config
from loram_cli.cli.app import run_command
from loram_cli.cli.draw.widths import width_advice
from loram_cli.config.recipe import Recipe, load_recipe
from loram_cli.errors import UsageError
from loram_cli.memory import account
from loram_cli.memory.presets import load_preset
from loram_cli.memory.setup import TrainingSetup
from loram_cli.memory.training import USABLE_SHARE, training_memory
from loram_cli.pruning.plan import layer_widths, pruned_config
from loram_cli.runs.manifest import Manifest
from loram_cli.runs.rundir import RunDirectory
from loram_cli.schema import Bytes, spec_from_mapping
from loram_cli.stages.core.results import PruneResult
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.prune.widths import choose_widths

PLAN = {"default": 0.5, "layers": {0: {"mlp": 0.25}, "2-2": {"heads": 0.75, "mlp": 0.9}}}


def spec_of(base: Path, out: Path, **changes: object) -> prune.PruneSpec:
    settings = {"strategy": "stru", "importance": "l2", "keep_first": 1, "keep_last": 1}
    values = {"model": base, "out": out, **settings, **changes}
    return spec_from_mapping(prune.PruneSpec, values, "prune")


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(PLAN))
    return file


def test_a_plan_is_pruned_trained_recovered_and_merged(
    base: Path, instructions: Path, plan_file: Path, tmp_path: Path
):
    prune.run(spec_of(base, tmp_path / "pruned", plan=plan_file), SILENT)
    results = Manifest.read(tmp_path / "pruned").results
    assert results["widths"] == {"0": [8, 4, 30], "1": [4, 2, 20], "2": [2, 1, 4], "3": [8, 4, 40]}
    assert results["base_widths"] == {str(i): [8, 4, 40] for i in range(4)}
    assert set(keep_of(tmp_path / "pruned")) == {0, 1, 2}
    check_training_and_recovery(tmp_path, base, instructions)


@pytest.mark.slow
def test_a_global_ranking_is_trained_recovered_and_merged(
    base: Path, instructions: Path, tmp_path: Path
):
    # One layer with larger weights than the others must lose less.
    from helpers.tiny_models import make_base
    from safetensors.torch import load_file, save_file

    uneven = make_base(tmp_path / "uneven")
    weights = load_file(uneven / "model.safetensors")
    for name in weights:
        if name.startswith("model.layers.2.") and "norm" not in name:
            weights[name] *= 1.3
    save_file(weights, uneven / "model.safetensors", metadata={"format": "pt"})
    prune.run(spec_of(uneven, tmp_path / "pruned", ratio=0.5, scope="global"), SILENT)
    results = Manifest.read(tmp_path / "pruned").results
    least, most = results["widths"]["1"], results["widths"]["2"]
    assert least[1] <= most[1] and least[2] < most[2]
    even = prune.plan(spec_of(uneven, tmp_path / "even", ratio=0.5), SILENT).work.pruned_params
    one_head = 2 * 2 * 4 * 32 * 2
    assert even - one_head < results["pruned_params"] <= even
    assert CheckpointIndex.open(tmp_path / "pruned").num_params == results["pruned_params"]
    check_training_and_recovery(tmp_path, uneven, instructions)


@pytest.mark.parametrize("scope", ["layer", slow("global")])
def test_channels_that_are_a_multiple_are_trained_recovered_and_merged(
    base: Path, instructions: Path, tmp_path: Path, scope
):
    spec = spec_of(base, tmp_path / "pruned", ratio=0.5, scope=scope, multiple_of=8)
    prune.run(spec, SILENT)
    results = Manifest.read(tmp_path / "pruned").results
    channels = [widths[2] for widths in results["widths"].values()]
    # 20 of 40 are no multiple; a global ranking may share 48 out otherwise.
    assert all(count % 8 == 0 for count in channels)
    assert sum(channels[1:3]) == 48 if scope == "layer" else sum(channels[1:3]) < 80
    assert CheckpointIndex.open(tmp_path / "pruned").num_params == results["pruned_params"]
    check_training_and_recovery(tmp_path, base, instructions)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_budget_is_met_in_multiples(base, tmp_path, scope):
    spec = spec_of(base, tmp_path / "pruned", scope=scope, target_params="40K", multiple_of=8)
    results = prune.run(spec, SILENT).manifest.results
    assert results["pruned_params"] <= 40_000
    assert all(widths[2] % 8 == 0 for widths in results["widths"].values())


def test_a_multiple_that_keeps_everything_is_refused(base, tmp_path):
    spec = spec_of(base, tmp_path / "out", ratio=0.1, multiple_of=64)
    with pytest.raises(UsageError, match="--multiple-of 64 keeps everything"):
        prune.plan(spec, SILENT)


def test_a_plan_is_rounded_too(base, plan_file, tmp_path):
    widths = prune.plan(
        spec_of(base, tmp_path / "out", plan=plan_file, multiple_of=16), SILENT
    ).work.after
    assert [layer.intermediate_size for layer in widths] == [32, 32, 16, 40]


@pytest.mark.parametrize(
    ("channels", "base_channels", "said"),
    [(4838, 13824, True), (4840, 13824, False), (179, 512, False), (4838, 13827, False)],
)
def test_widths_that_a_gpu_multiplies_slowly_are_told(channels, base_channels, said):
    result = PruneResult(
        base_params=2,
        pruned_params=1,
        reduction=2.0,
        removed_share=0.5,
        weight_bytes=2,
        widths={"0": (8, 8, 4864), "1": (8, 8, channels)},
        base_widths={"0": (8, 8, 4864), "1": (8, 8, base_channels)},
    )
    advice = width_advice(result)
    assert bool(advice) == said
    assert all("4838 MLP channels" in line and "--multiple-of 64" in line for line in advice)


@pytest.mark.parametrize(
    ("heads", "kept", "ratio", "said"),
    [
        ((4, 1), (4, 1), 0.65, "0.65 of 1 key/value head is less"),
        ((14, 2), (14, 2), 0.35, "0.35 of 2 key/value heads is less"),
        ((14, 2), (7, 1), 0.65, None),
        # A family whose heads do not go at any ratio.
        ((8, 8), (8, 8), 0.65, None),
        ((4, 1), (4, 1), None, None),
    ],
)
def test_a_ratio_that_is_too_low_for_a_head_is_told(heads, kept, ratio, said):
    result = PruneResult(
        base_params=2, pruned_params=1, reduction=2.0, removed_share=0.5, weight_bytes=2,
        ratio=ratio, scope="layer", widths={"0": (*heads, 64), "1": (*kept, 32)},
        base_widths={"0": (*heads, 64), "1": (*heads, 64)},
    )  # fmt: skip
    advice = width_advice(result)
    assert len(advice) == (said is not None)
    assert all(said in line and "MLP channels alone" in line for line in advice)


def setup_of(budget):
    return TrainingSetup(
        rank=budget.get("rank", 8),
        quantize=budget.get("quantize"),
        micro_batch=budget.get("micro_batch", 4),
        length=budget.get("max_length", 512),
        gradient_checkpointing=budget.get("gradient_checkpointing", False),
    )


def card_at(base, ratio, budget):
    """The card that a training so set up wants at a ratio."""
    config = read_config(base)
    family = family_for(config, "test")
    geometry = family.geometry(config)
    pruned = pruned_config(config, geometry, layer_widths(geometry, ratio, 1, 1))
    return math.ceil(training_memory(family, pruned, setup_of(budget)).total / USABLE_SHARE)


@pytest.mark.parametrize("scope", ["layer", slow("global")])
@pytest.mark.parametrize(
    "budget",
    [
        {"target_params": "40K"},
        {"fit_memory": 0},
        {"fit_memory": 0, "quantize": "nf4", "micro_batch": 1, "max_length": 16},
        {"fit_memory": 0, "gradient_checkpointing": True, "rank": 16},
    ],
    ids=["params", "bf16", "nf4", "checkpointing"],
)
def test_a_budget_is_met_and_hardly_undershot(base, tmp_path, scope, budget):
    if "fit_memory" in budget:
        budget = {**budget, "fit_memory": card_at(base, 0.5, budget)}
    spec = spec_of(base, tmp_path / "pruned", scope=scope, **budget)
    result = prune.run(spec, SILENT).manifest.results
    config = read_config(tmp_path / "pruned")
    family = family_for(config, "test")
    params = account.count_params(family, config).total
    assert params == result["pruned_params"] == CheckpointIndex.open(spec.out).num_params
    if spec.target_params is not None:
        # A head with its queries is 1536 parameters, in two layers at once.
        assert 40_000 - 2 * (1536 + 96) <= params <= 40_000
        return
    needed = training_memory(family, config, setup_of(budget))
    assert needed.fits(spec.fit_memory)
    assert result["card_bytes"] == math.ceil(needed.total / USABLE_SHARE) <= spec.fit_memory
    wider = card_at(base, 0.5 - 1 / 32, budget)
    assert result["card_bytes"] > spec.fit_memory - (wider - spec.fit_memory) * 2


def test_70b_in_24_gib_on_nf4_takes_the_smallest_ratio_that_fits():
    config = load_preset("llama2-70b")
    family = family_for(config, "test")
    spec = prune.PruneSpec(
        model=Path(),
        out=Path(),
        fit_memory=Bytes.parse("24GiB"),
        quantize="nf4",
        strategy="rand",
        gradient_checkpointing=True,
    )
    chosen = choose_widths(spec, family, config)
    assert chosen.over_budget(chosen.after) <= 0 < chosen.ratio < 1
    wider = prune.PruneSpec(model=Path(), out=Path(), ratio=chosen.ratio - 1e-5, strategy="rand")
    assert chosen.over_budget(choose_widths(wider, family, config).after) > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio": 0.5, "target_params": "40K"}, "--ratio and --target-params exclude each other"),
        ({"plan": Path("x"), "fit_memory": "1GiB"}, "--plan and --fit-memory exclude each other"),
        ({"target_params": "six"}, "target_params: 'six' is not a count of parameters"),
        ({"fit_memory": "6 parsecs"}, "fit_memory: '6 parsecs' is not an amount"),
        ({"target_params": 0}, "--target-params must be above 0"),
        ({"quantize": "nf4"}, "--quantize tells --fit-memory"),
        ({"micro_batch": 2}, "--micro-batch tells --fit-memory"),
        ({"fit_memory": 10**9, "max_length": 0}, "--max-length must be above 0"),
        ({"scope": "global", "strategy": "rand", "importance": None}, "draws them"),
        ({"scope": "global", "plan": Path("x")}, "says what each loses"),
        ({"multiple_of": 0}, "--multiple-of must be above 0"),
        ({"multiple_of": 8, "strategy": "unst"}, "--multiple-of does not go with --strategy unst"),
    ],
)
def test_what_excludes_each_other_is_refused(base, tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        spec_of(base, tmp_path / "out", **changes)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"target_params": "1B"}, r"--target-params 1.00B: the whole base takes .* fits already"),
        ({"target_params": "17K"}, r"--target-params 17.00K: even at one head"),
        ({"fit_memory": "1KiB"}, r"or add --quantize nf4 --gradient-checkpointing --micro-batch 1"),
    ],
)
def test_budgets_that_ask_nothing_or_too_much(base, tmp_path, budget, said):
    with pytest.raises(UsageError, match=said):
        prune.plan(spec_of(base, tmp_path / "out", **budget), SILENT)


def test_another_plan_in_the_same_file_is_another_pruning(base, plan_file, tmp_path):
    spec = spec_of(base, tmp_path / "pruned", plan=plan_file)
    first = prune.run(spec, SILENT)
    plan_file.write_text(json.dumps(PLAN))
    assert not prune.run(spec, SILENT).fresh
    plan_file.write_text(yaml.safe_dump({"layers": {"1": 0.5}}))
    with pytest.raises(Exception, match="force"):
        prune.run(spec, SILENT)
    assert first.fresh


@pytest.mark.parametrize("text", [None, "layers: [", "{}", "layers: {9: 0.5}", "layers: {1: 0}"])
def test_plans_that_cannot_be_used(base, tmp_path, text):
    file = tmp_path / "plan.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=r"plan\.yaml"):
        prune.plan(spec_of(base, tmp_path / "out", plan=file), SILENT)


def test_a_picture_and_the_same_bytes_twice(base, plan_file, tmp_path):
    for name in ("a", "b"):
        prune.run(spec_of(base, tmp_path / name, plan=plan_file), SILENT)
    a, b = ((tmp_path / n / "kept.png").read_bytes() for n in ("a", "b"))
    assert a == b
    assert a[:4] == b"\x89PNG"


def test_recipes_take_plans_and_budgets(plan_file, tmp_path):
    for section in (
        {"target_params": "40B"},
        {"fit_memory": "24GiB", "quantize": "nf4", "rank": 16, "gradient_checkpointing": True},
        {"ratio": 0.5, "scope": "global"}, {"plan": str(plan_file)},
    ):  # fmt: skip
        prune_section = {"strategy": "stru", "importance": "l2", **section}
        file = tmp_path / "recipe.yaml"
        file.write_text(
            yaml.safe_dump({"model": "x/y", "preset": "llama2-70b", "prune": prune_section})
        )
        assert isinstance(load_recipe(file), Recipe)
        run = RunDirectory(tmp_path / "run")
        planned = pipeline.plan(load_recipe(file), run, SILENT)[0].figures["result"]
        assert planned.pruned_params < planned.base_params
        if "target_params" in section:
            assert 0.98 * 40e9 < planned.pruned_params <= 40e9


def test_the_command_shows_what_it_would_keep(base, plan_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["prune", "--model", str(base), "--run", "run", "--dry-run", "--strategy", "rand"]
    assert run_command([*command, "--plan", str(plan_file), "--keep-first", "1",
                        "--keep-last", "1"]) == 0  # fmt: skip
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0", "8", "4", "30", "of", "40", "100%", "heads,", "75%", "MLP"] in lines
    assert [
        "2",
        "2",
        "of",
        "8",
        "1",
        "of",
        "4",
        "4",
        "of",
        "40",
        "25%",
        "heads,",
        "10%",
        "MLP",
    ] in lines
    assert run_command([*command, "--json", "--target-params", "40K", "--keep-first", "0",
                        "--keep-last", "0"]) == 0  # fmt: skip
    planned = json.loads(capsys.readouterr().out)["plans"][0]["figures"]["result"]
    assert planned["pruned_params"] <= 40_000
    assert 0 < planned["ratio"] < 1
    assert run_command([*command, "--ratio", "0.5", "--target-params", "40K"]) == 2
