from pathlib import Path

import pytest

from loram_cli.config.recipe import Recipe, setting_types
from loram_cli.config.settings import load_settings
from loram_cli.errors import UsageError
from loram_cli.schema import Bytes

FILE = """\
run: from-file
model: some/model
train:
  steps: 7
  learning_rate: 1e-3
  targets: [q_proj, v_proj]
eval:
  task_data: {gsm8k: test.jsonl}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "loram.yaml").write_text(FILE)
    return tmp_path


def test_the_file_is_typed(folder: Path):
    settings = load_settings(folder, {})
    assert settings.run == Path("from-file")
    assert settings.model == "some/model"
    assert settings.section("train") == {
        "steps": 7,
        "learning_rate": 1e-3,
        "targets": ("q_proj", "v_proj"),
    }
    assert settings.section("eval") == {"task_data": {"gsm8k": Path("test.jsonl")}}
    assert settings.sources == ("loram.yaml",)


def test_the_environment_wins_over_the_file_and_is_typed(folder: Path):
    settings = load_settings(
        folder,
        {
            "LORAM_TRAIN_STEPS": "9",
            "LORAM_TRAIN_LEARNING_RATE": "1e-5",
            "LORAM_TRAIN_TARGETS": "o_proj, up_proj",
            "LORAM_TRAIN_GRADIENT_CHECKPOINTING": "true",
            "LORAM_TRAIN_DATA": "007",
            "LORAM_EVAL_TASK_DATA": "a=b.jsonl,c=d.jsonl",
        },
    )
    train = settings.section("train")
    assert train["steps"] == 9
    assert train["learning_rate"] == 1e-5
    assert train["targets"] == ("o_proj", "up_proj")
    assert train["gradient_checkpointing"] is True
    assert train["data"] == "007"
    assert settings.section("eval")["task_data"] == {"a": Path("b.jsonl"), "c": Path("d.jsonl")}


def test_a_shared_variable_reaches_every_stage_that_has_it(tmp_path: Path):
    settings = load_settings(tmp_path, {"LORAM_SEED": "3", "LORAM_TRAIN_SEED": "4"})
    assert settings.section("prune") == {"seed": 3}
    assert settings.section("train") == {"seed": 4}
    assert settings.section("recover") == {}


def test_a_recipe_is_above_the_file_and_below_the_environment(folder: Path):
    recipe = Recipe(model="demo", train={"learning_rate": 5e-5}, prune={})
    settings = load_settings(folder, {"LORAM_PRUNE_RATIO": "0.3"})
    merged = settings.over(recipe)
    assert merged.train["learning_rate"] == 5e-5
    assert merged.train["steps"] == 7
    assert merged.prune == {"ratio": 0.3}
    assert merged.eval is None, "a stage that the recipe leaves out is not added"


def test_pyproject_serves_as_well_and_loram_yaml_before_it(tmp_path: Path):
    (tmp_path / "pyproject.toml").write_text("[tool.loram.train]\nsteps = 3\n[tool.other]\nx = 1\n")
    assert load_settings(tmp_path, {}).section("train") == {"steps": 3}
    (tmp_path / "loram.yaml").write_text("train:\n  steps: 4\n")
    assert load_settings(tmp_path, {}).section("train") == {"steps": 4}
    named = tmp_path / "other.yaml"
    named.write_text("train:\n  steps: 5\n")
    assert load_settings(tmp_path, {"LORAM_CONFIG": str(named)}).section("train") == {"steps": 5}


def test_without_any_file_nothing_is_set(tmp_path: Path):
    settings = load_settings(tmp_path, {"HOME": "/x", "LORAM_RUN": "r", "LORAM_DEBUG": "1"})
    assert settings.sources == ()
    assert all(not settings.section(stage) for stage in ("prune", "train", "eval"))
    for text in (b"\xff\xfe broken", b"tool = 3", b"[tool]\nloram2 = 1"):
        (tmp_path / "pyproject.toml").write_bytes(text)
        assert load_settings(tmp_path, {}).sources == ()


@pytest.mark.parametrize(
    ("text", "environ", "message"),
    [
        ("trian:\n  steps: 3\n", {}, "loram.yaml: unknown key 'trian'.*did you mean 'train'"),
        ("train:\n  step: 3\n", {}, "unknown key 'step'.*did you mean 'steps'"),
        ("train:\n  steps: many\n", {}, "steps: expected a whole number, not 'many'"),
        ("train: 3\n", {}, "expected a mapping"),
        ("train:\n  out: here\n", {}, "unknown key 'out'"),
        ("- a\n", {}, "a settings file is a mapping"),
        ("a: [", {}, "not valid YAML"),
        ("", {"LORAM_TRAIN_STEP": "3"}, "unknown variable.*did you mean 'LORAM_TRAIN_STEPS'"),
        ("", {"LORAM_TRAIN_STEPS": "many"}, "LORAM_TRAIN_STEPS: expected a whole number"),
        ("", {"LORAM_TRAIN_QUANTIZE": "nf5"}, "unknown value 'nf5'.*did you mean 'nf4'"),
        ("", {"LORAM_CONFIG": "/gone.yaml"}, "gone.yaml: cannot be read"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text, environ, message):
    (tmp_path / "loram.yaml").write_text(text)
    with pytest.raises(UsageError, match="(?s)" + message):
        load_settings(tmp_path, environ)


def test_every_setting_has_a_type():
    types = setting_types("recover")
    assert types == {
        "merge": bool,
        "max_shard_bytes": Bytes,
        "checkpoint": str | None,
        "fit_scale": bool,
        "scale_examples": int,
        "device": str | None,
    }
    assert {"steps", "report_to", "seed"} <= set(setting_types("train"))
    assert "out" not in setting_types("train")
