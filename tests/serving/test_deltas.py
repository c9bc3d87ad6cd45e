import pytest

from loram_cli.serving.deltas import Deltas


def pieces(deltas: Deltas, text: str, end: str | None = None) -> list[str]:
    """What a client gets of a text that grows a character at a time."""
    sent = [deltas.take(text[:i]) for i in range(1, len(text) + 1)]
    return [*sent, deltas.rest(text if end is None else end)]


@pytest.mark.parametrize("text", ["", "one", " two words \n", "a\n\nb", "é\ufffd"])
@pytest.mark.parametrize("strip", [False, True])
def test_the_pieces_are_the_whole_answer(text, strip):
    found = pieces(Deltas(["\n\nQuestion:", "STOP"], strip=strip), text)
    assert "".join(found) == (text.strip() if strip else text)


def test_the_begin_of_a_stop_is_held_back_until_it_is_none():
    deltas = Deltas(["\n\nQ:"])
    assert [deltas.take(text) for text in ("a", "a\n", "a\n\n", "a\n\nb")] == ["a", "", "", "\n\nb"]
    deltas = Deltas(["\n\nQ:"])
    assert "".join(pieces(deltas, "a\n\nQ", end="a")) == "a"


def test_half_a_character_is_held_back():
    deltas = Deltas()
    assert [deltas.take(text) for text in ("a", "a\ufffd", "a\ufffd\ufffd", "aé")] == [
        "a",
        "",
        "",
        "é",
    ]


def test_white_space_that_may_be_the_last_is_held_back():
    assert pieces(Deltas(strip=True), " a b ") == ["", "a", "", " b", "", ""]
