"""A default stands once: in its spec. Help is made from it; recipes and pages do not repeat it."""

import re
from pathlib import Path

import pytest

from loram_cli.cli.commands.table import COMMANDS, build, load
from loram_cli.cli.from_spec import default_text, help_text
from loram_cli.config.defaults import Place, train_spec
from loram_cli.config.recipe import SPECS, load_recipe
from loram_cli.errors import UsageError
from loram_cli.runs.rundir import RunDirectory
from loram_cli.schema import flag_of, plain, settings_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "loram_cli" / "docs").glob("*.md"))]


def test_every_flag_tells_its_specs_default():
    seen = 0
    for module in map(load, COMMANDS):
        if module.SPEC is None:
            continue
        shown = {p.name: p.help for p in build(module.NAME).params}
        for field, told in settings_of(module.SPEC):
            if told.flag != "":
                assert shown[field.name] == help_text(field, told)
                seen += bool(default_text(field, told))
    assert seen > 60


# A recipe named after a paper holds the paper's values, whatever the defaults become.
OWN = [file for file in RECIPES if not file.stem.startswith("paper-")]


@pytest.mark.parametrize("recipe", OWN, ids=lambda file: file.stem)
def test_a_recipe_repeats_no_default(recipe: Path):
    loaded = load_recipe(recipe)
    for stage, spec in SPECS.items():
        defaults = {field.name: plain(field.default) for field, _ in settings_of(spec)}
        repeated = {k for k, v in loaded.section(stage).items() if plain(v) == defaults[k]}
        # What the recipe is about is named, whatever the default.
        assert repeated <= {"strategy", "tasks", "method"}, f"{recipe.name}, {stage}"


@pytest.mark.parametrize("page", PAGES, ids=lambda file: file.name)
def test_a_page_writes_no_default_beside_a_flag(page: Path):
    flags = {
        flag_of(field.name, told): default_text(field, told)
        for spec in SPECS.values()
        for field, told in settings_of(spec)
    }
    for name, default in re.findall(
        r"`(--[a-z-]+)`[^.\n|]{0,40}\(default:? `?([^)`]+)`?\)", page.read_text()
    ):
        assert name not in flags, f"{page.name} writes {name}'s default {default}"


@pytest.mark.parametrize(
    ("given", "batch"),
    [({}, 64), ({"generations": 4}, 32), ({"generations": "x"}, 64), ({"batch": 16}, 16)],
)
def test_a_step_of_grpo_holds_eight_questions(tmp_path: Path, given: dict, batch: int):
    values = {"objective": "grpo", "data": "x.jsonl", "source": tmp_path, **given}
    place = Place(RunDirectory(tmp_path), str(tmp_path))
    if given.get("generations") == "x":
        with pytest.raises(UsageError):
            train_spec(place, values)
    else:
        assert train_spec(place, values).batch == batch
    assert train_spec(place, {**values, "objective": "sft", "generations": None}).batch != 64
