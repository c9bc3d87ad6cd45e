"""Where no text is named, the training data is what pruning ranks and alignment learns on."""

import pytest

from loram_cli.cli.options import layered
from loram_cli.config.recipe import Recipe, load_recipe, on_training_data

TRAINING = {"data": "mine.jsonl"}


@pytest.mark.parametrize(
    ("stage", "values", "added"),
    [
        ("align", {}, {"data": "mine.jsonl"}),
        ("align", {"data": "text.txt"}, {}),
        ("prune", {}, {"calibration": "mine.jsonl"}),
        ("prune", {"strategy": "stru", "importance": "l2"}, {}),
        ("prune", {"strategy": "rand"}, {}),
        ("prune", {"strategy": "unst"}, {"calibration": "mine.jsonl"}),
        ("prune", {"strategy": "depth", "calibration": "text.txt"}, {}),
        ("recover", {}, {}),
    ],
)
def test_what_is_left_open_is_the_training_data(stage, values, added):
    assert on_training_data(stage, values, TRAINING) == {**added, **values}


def test_preferences_and_questions_are_no_text():
    assert on_training_data("align", {}, {"data": "pairs.jsonl", "objective": "dpo"}) == {}
    assert on_training_data("align", {}, {}) == {}


def test_a_recipe_needs_no_text_of_its_own(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: some/base\nprune: {}\nalign: {}\ntrain: {data: mine.jsonl}\n")
    recipe = load_recipe(file)
    assert recipe.filled("prune") == {"calibration": "mine.jsonl"}
    assert recipe.filled("align") == {"data": "mine.jsonl"}
    assert recipe.section("align") == {}
    assert Recipe(model="m", align={"data": "t"}).filled("align") == {"data": "t"}


def test_flags_and_settings_of_one_s_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAM_TRAIN_DATA", "mine.jsonl")
    assert layered("align", {})["data"] == "mine.jsonl"
    assert layered("align", {"data": "text.txt"})["data"] == "text.txt"
    assert "calibration" not in layered("prune", {"strategy": "rand"})
    assert layered("prune", {})["calibration"] == "mine.jsonl"
