import json
from pathlib import Path

import pytest

from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.tokenizer_files import check_tokenizer
from loram_cli.errors import LoramError


def write(directory: Path, **files: object) -> Path:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


WHOLE = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<s>", "id": 2}]}


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
    ],
    ids=["tokenizer", "vocab", "added", "config"],
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
