import csv

import pytest

from loram_cli.training.curves import draw_curve, write_curve_csv
from loram_cli.training.loop.options import LossRow


@pytest.fixture
def rows():
    train = [LossRow(i, "train", 3 / i + (i % 3) / 10, 1e-4 / i) for i in range(1, 41)]
    return [LossRow(0, "eval", 3.2), *train, LossRow(40, "eval", 0.4)]


def test_csv_holds_every_point(rows, tmp_path):
    write_curve_csv(rows, tmp_path / "loss.csv")
    with (tmp_path / "loss.csv").open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    assert read[0] == {"step": "0", "split": "eval", "loss": "3.200000", "learning_rate": ""}
    assert float(read[5]["learning_rate"]) == pytest.approx(1e-4 / 5, rel=1e-5)


@pytest.mark.parametrize("part", [slice(None), slice(0, 1), slice(1, 5), slice(1, 2)])
def test_picture_of_any_curve_is_a_png_and_the_same_each_time(rows, tmp_path, part):
    for name in ("a.png", "b.png"):
        draw_curve(rows[part], tmp_path / name, "LoRA on 40 steps")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_picture_shows_the_curve(rows, tmp_path):
    from matplotlib.image import imread

    draw_curve(rows, tmp_path / "a.png", "LoRA")
    draw_curve([LossRow(r.step, r.split, 5 - r.loss) for r in rows], tmp_path / "b.png", "LoRA")
    assert (imread(tmp_path / "a.png") != imread(tmp_path / "b.png")).mean() > 0.005
