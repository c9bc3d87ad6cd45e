import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.tokenizer_files import check_tokenizer, encoding
from loram_cli.errors import LoramError


def write(directory: Path, **files: object) -> Path:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


WHOLE = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<s>", "id": 2}]}
TWO = {"model": {"vocab": {"a": 0, "b": 1}}}


def test_a_tokenizer_that_fits_passes(tmp_path: Path):
    check_tokenizer(tmp_path, 0)  # there is none
    check_tokenizer(write(tmp_path, tokenizer=WHOLE), 3)
    check_tokenizer(write(tmp_path, tokenizer={"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}), 2)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer": WHOLE},
        {"vocab": {"a": 0, "<s>": 2}},
        {"vocab": {"a": 0}, "added_tokens": {"<s>": 2}},
        {"tokenizer_config": {"added_tokens_decoder": {"2": {"content": "<s>"}}}},
        {"tokenizer": TWO, "tokenizer_config": {"eos_token": "<s>"}},
        {"tokenizer": TWO, "tokenizer_config": {"extra_special_tokens": {"x": "a", "y": "<s>"}}},
        {"tokenizer": TWO, "special_tokens_map": {"pad_token": {"content": "<s>"}}},
        {"tokenizer": {**TWO, "post_processor": {"special_tokens": {"<s>": {"ids": [0, 2]}}}}},
        {"tokenizer": {**TWO, "post_processor": {"processors": [{}, {"cls": ["<s>", 2]}]}}},
    ],
    ids=[
        "tokenizer",
        "vocab",
        "added",
        "config",
        "special",
        "extra",
        "older file",
        "template",
        "cls",
    ],
)
def test_a_token_beyond_the_embedding_is_named(files, tmp_path: Path):
    write(tmp_path, **files)
    check_tokenizer(tmp_path, 3)
    with pytest.raises(LoramError, match=r"token 2 \('<s>'\) is beyond .* of 2 tokens\n.*\(3\)"):
        check_tokenizer(tmp_path, 2)


def test_a_placeholder_of_images_has_no_row_in_a_text_model(tmp_path: Path):
    write(tmp_path, tokenizer=WHOLE, tokenizer_config={"image_token": "<s>"})
    check_tokenizer(tmp_path, 2)
    write(tmp_path, tokenizer_config={"extra_special_tokens": {"image_token": "<s>"}})
    check_tokenizer(tmp_path, 2)


def test_special_tokens_that_a_vocabulary_has_are_no_new_ones(tmp_path: Path):
    special = {"eos_token": "<s>", "additional_special_tokens": ["a"], "unk_token": None}
    check_tokenizer(write(tmp_path, tokenizer=WHOLE, tokenizer_config=special), 3)
    # Without tokenizer.json the vocabulary is in a file that nobody reads here.
    (tmp_path / "tokenizer.json").unlink()
    check_tokenizer(write(tmp_path, added_tokens={"<x>": 3}), 4)


@pytest.mark.parametrize("error", [Exception("Missing [UNK] token"), ValueError("ours")])
def test_a_text_that_a_tokenizer_cannot_encode_is_its_fault(error):
    tokenizer = SimpleNamespace(name_or_path="model")
    with (
        pytest.raises(Exception, match=r"ours|model: its tokenizer .*Missing") as raised,
        encoding(tokenizer),
    ):
        raise error
    assert isinstance(raised.value, LoramError) == (type(error) is Exception)


def test_what_is_no_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(LoramError, match=r"tokenizer\.json: not a tokenizer"):
        check_tokenizer(write(tmp_path, tokenizer={"version": 1}), 2)


@pytest.mark.parametrize("tokenizer", [True, False])
def test_every_command_checks_it(tokenizer, base: Path, tmp_path: Path):
    import shutil

    directory = shutil.copytree(base, tmp_path / "grown")
    file = directory / "tokenizer.json"
    data = json.loads(file.read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "content": "<new>", "id": 258})
    file.write_text(json.dumps(data))
    with pytest.raises(LoramError, match="'<new>'"):
        Model.open(directory).check_whole(tokenizer=tokenizer)
