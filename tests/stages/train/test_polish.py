"""``polish``: a few exact steps on the full model after a recovery, and what the run makes of it."""

import json

import pytest
import yaml

from loram_cli.cli.app import run_command
from loram_cli.errors import UsageError
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.train.spec import PolishSpec

pytestmark = pytest.mark.integration

PRUNE = {"strategy": "rand", "ratio": 0.5, "keep_first": 1, "keep_last": 1}
TRAIN = {
    "steps": 2, "batch": 2, "micro_batch": 1, "max_length": 48, "learning_rate": 1e-2,
    "warmup_steps": 0, "eval_examples": 2,
}  # fmt: skip


def loram(*words):
    return run_command([str(word) for word in words])


@pytest.fixture(scope="module")
def recipe(base, instructions, tmp_path_factory):
    """A recipe with a polish after the recovery, run."""
    folder = tmp_path_factory.mktemp("polish")
    text = {
        "model": str(base),
        "prune": PRUNE,
        "train": {**TRAIN, "data": str(instructions)},
        "recover": {},
        "polish": {"steps": 2},
        "eval": {"tasks": ["perplexity"], "limit": 4,
                 "task_data": {"perplexity": str(instructions)}},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(text))
    return folder


@pytest.fixture(scope="module")
def run(recipe):
    """The recipe's run directory, finished."""
    assert loram("run", recipe / "recipe.yaml", "--run", recipe / "run") == 0
    return recipe / "run"


def test_a_recipe_is_planned_with_it_before_anything_is_there(recipe, capsys):
    words = ["run", recipe / "recipe.yaml", "--run", recipe / "none", "--dry-run", "--json"]
    assert loram(*words) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [plan["stage"] for plan in plans] == ["prune", "train", "recover", "polish", "eval"]
    polish = plans[3]
    assert polish["writes"] == str(recipe / "none" / "polished")
    assert polish["figures"]["steps"] == 2 and polish["figures"]["batch"] == TRAIN["batch"]
    assert polish["figures"]["params"] > plans[1]["figures"]["params"]


def test_it_goes_on_as_the_adapter_was_trained(run, instructions):
    manifest, trained = Manifest.read(run / "polished"), Manifest.read(run / "adapter")
    assert manifest.stage == "train" and manifest.spec["stream"] is True
    for name in ("data", "batch", "micro_batch", "max_length", "learning_rate", "rank"):
        assert manifest.spec[name] == trained.spec[name], name
    assert manifest.spec["steps"] == 2 and manifest.spec["warmup_steps"] == 0
    assert manifest.inputs["adapter"]["key"] == Manifest.read(run / "recovered").key
    assert manifest.inputs["source"]["path"] == manifest.base["path"]


def test_the_evaluation_has_a_row_for_it(run):
    rows = list(Manifest.read(run / "eval").results["rows"])
    assert set(rows) == {"base", "pruned", "recovered", "polished"}


def test_verify_follows_it_to_the_base_and_tells_an_adapter_that_was_changed(run, capsys):
    assert loram("verify", run) == 0
    capsys.readouterr()
    weights = run / "recovered" / "adapter_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes((run / "polished" / weights.name).read_bytes())
    try:
        assert loram("verify", run / "polished") == 1
    finally:
        weights.write_bytes(before)
    assert "is another adapter than the one that was used" in capsys.readouterr().out


def test_the_card_says_that_it_fits_the_base(run):
    card = (run / "polished" / "README.md").read_text()
    assert card.count("PeftModel.from_pretrained") == 1 and "pruned model" not in card
    assert "pruned model" in (run / "adapter" / "README.md").read_text()


def test_the_bare_command_finds_what_the_run_has(run, recipe, capsys):
    # The same as the recipe's, and so done already.
    assert loram("polish", "--run", run, "--steps", 2) == 0
    told = capsys.readouterr()
    assert "was done already" in told.out and "loram recover" not in told.out
    assert "as the adapter was trained: data=" in told.err
    out = recipe / "elsewhere"
    words = ["polish", "--from-adapter", run / "recovered", "--out", out, "--steps", 1]
    assert loram(*words, "--no-stream") == 0
    assert Manifest.read(out).spec["stream"] is False


def test_a_run_without_a_recovery_is_told_what_comes_first(tmp_path, base, capsys):
    assert loram("polish", "--run", tmp_path / "run", "--model", base) == 1
    assert "run 'loram recover' first" in capsys.readouterr().err


def test_other_objectives_are_refused(base, tmp_path):
    with pytest.raises(UsageError, match="objective dpo is not supported"):
        PolishSpec(source=base, out=tmp_path / "out", data="x", objective="dpo")


def test_export_and_generate_take_the_polished_adapter(run, base):
    from loram_cli.config.defaults import Place, export_spec
    from loram_cli.config.rows import asked_rows, run_rows
    from loram_cli.runs.rundir import RunDirectory

    place = Place(RunDirectory(run), str(base))
    assert export_spec(place, {}).adapter == run / "polished"
    assert list(asked_rows(run_rows(place.run, base), None, {})) == ["polished"]
