import pytest

from loram_cli.runs.whole import damage, is_marked, mark_whole


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "slices").mkdir()
    (tmp_path / "slices" / "a.bin").write_bytes(b"weights")
    (tmp_path / "state.json").write_text("{}")
    mark_whole(tmp_path)
    return tmp_path


def test_a_marked_folder_is_whole(folder):
    assert damage(folder) is None
    mark_whole(folder)
    assert damage(folder) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "slices" / "a.bin").unlink(), "slices/a.bin is missing"),
        (lambda f: (f / "slices" / "a.bin").write_bytes(b"weightz"), "slices/a.bin has changed"),
        (lambda f: (f / "state.json").write_text(""), "state.json has changed"),
        (lambda f: (f / "more").touch(), "more has changed"),
        (lambda f: (f / "whole").write_text("{}"), "slices/a.bin has changed"),
        (lambda f: (f / "whole").write_text(""), "whole cannot be read"),
        (lambda f: (f / "whole").write_text("7"), "whole cannot be read"),
        (lambda f: (f / "whole").write_text("[" * 99999), "whole cannot be read"),
        (lambda f: (f / "whole").write_bytes(b"\xff"), "whole cannot be read"),
        (lambda f: (f / "whole").unlink(), "it was not written whole"),
    ],
)
def test_any_change_is_seen(folder, change, said):
    change(folder)
    assert damage(folder) == said
    assert is_marked(folder) == (said != "it was not written whole")
