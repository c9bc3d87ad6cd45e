"""Models and data that many tests share."""

import json
from pathlib import Path

import pytest
from tiny import make_base

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the shared folder with real weights and data is absent")
    return SHARED


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"Line {i}: the quick brown fox jumps over {i * 7} lazy dogs." for i in range(120)]
    file.write_text("\n\n".join(lines))
    return file


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("instructions") / "train.jsonl"
    rows = [{"question": f"What is {i} plus 1?", "answer": f"#### {i + 1}"} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def shared_file():
    def find(name):
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"reference input {name} is not beside the checkout")
        return path

    return find
