import pytest

from loram_cli.cli.draw import console as render


@pytest.mark.parametrize(
    ("done", "seconds", "text"),
    [(0, 9.0, ""), (30, 10.0, "3.0 step/s"), (2, 9.0, "4.5 s/step")],
)
def test_a_rate_is_told_the_way_round_that_shows_it(done, seconds, text):
    assert render.format_rate(done, seconds, "step") == text


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(render.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines_of(capsys):
    def told(work):
        with render.ConsoleReporter().progress("train", 100, "step") as progress:
            work(progress)
        return capsys.readouterr().err.splitlines()

    return told


def test_plain_lines_tell_rate_and_time_left(clock, lines_of):
    def work(progress):
        progress.detail("loss 2.31")
        for _ in range(100):
            clock[0] += 0.5
            progress.advance()

    first, *_, last = lines_of(work)
    assert first == "train: 20/100 step, 2.0 step/s, 40.0 s left, loss 2.31"
    assert last == "train: 100/100 step, 2.0 step/s, loss 2.31"


def test_steps_of_an_earlier_run_count_as_done_and_not_for_the_rate(clock, lines_of):
    def work(progress):
        progress.skip(80)
        clock[0] += 20
        progress.advance()

    assert lines_of(work) == ["train: 81/100 step, 20.0 s/step, 6 min 20 s left"]


def test_nothing_is_reckoned_before_the_first_step(clock, lines_of):
    def work(progress):
        clock[0] += 20
        progress.advance(0)

    assert lines_of(work) == ["train: 0/100 step"]
