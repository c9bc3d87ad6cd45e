import pytest
import torch

from loram_cli.arch.registry import families
from loram_cli.arch.spec import Geometry, LayerGeometry
from loram_cli.errors import UsageError
from loram_cli.pruning.groups import LayerKeep
from loram_cli.pruning.plan import layer_widths, narrowed, per_layer_config
from loram_cli.pruning.rand import keep_random
from loram_cli.pruning.scores import l2_sums, layer_scores, taylor_salience
from loram_cli.pruning.strategy import LayerToPrune
from loram_cli.pruning.stru import keep_highest

LAYER = LayerGeometry(8, 4, 16, 320)


@pytest.mark.parametrize(
    ("heads", "ratio", "kept"),
    [(8, 0.65, 3), (8, 0.85, 2), (8, 0.95, 1), (20, 0.95, 1), (40, 0.65, 14)],
)
def test_kept_heads(heads: int, ratio: float, kept: int):
    layer = LayerGeometry(heads * 2, heads, 16, 1000)
    after = narrowed(layer, ratio)
    assert (after.num_key_value_heads, after.num_attention_heads) == (kept, kept * 2)


def test_first_and_last_layers_stay():
    geometry = Geometry(128, 512, False, (LAYER,) * 12)
    widths = layer_widths(geometry, 0.85)
    assert [w == LAYER for w in widths] == [True] * 4 + [False] * 6 + [True] * 2
    assert set(per_layer_config(geometry, widths)) == {"4", "5", "6", "7", "8", "9"}


def test_too_few_layers_names_the_flags():
    with pytest.raises(UsageError, match="--keep-first and --keep-last"):
        layer_widths(Geometry(128, 512, False, (LAYER,) * 6), 0.5)


def test_ratio_that_leaves_nothing():
    with pytest.raises(UsageError, match="lower --ratio"):
        narrowed(LayerGeometry(4, 2, 8, 10), 0.999)


def test_query_heads_follow_their_group():
    keep = LayerKeep((1, 3), (0, 5))
    layer = LayerGeometry(8, 4, 2, 6)
    assert keep.axis_indices("query", layer) == [4, 5, 6, 7, 12, 13, 14, 15]
    assert keep.axis_indices("key_value", layer) == [2, 3, 6, 7]
    assert keep.axis_indices("intermediate", layer) == [0, 5]


def test_scores_are_sums_over_coupled_tensors():
    family = next(f for f in families() if f.family == "llama")
    layer = LayerGeometry(4, 2, 3, 5)
    hidden = 12
    torch.manual_seed(0)
    weights = {}
    for module in family.modules:
        rows = sum(layer.axis_units(a) for a in module.rows) or hidden
        columns = sum(layer.axis_units(a) for a in module.columns) or hidden
        weights[module.name] = torch.randn(rows, columns), torch.randn(rows, columns)
    scores = layer_scores(family, layer, lambda m: taylor_salience(*weights[m.name]))
    product = {name: (w * g).abs().double() for name, (w, g) in weights.items()}
    q, k, v, o, gate, up, down = product.values()
    for group in range(2):
        wide, narrow = slice(group * 6, group * 6 + 6), slice(group * 3, group * 3 + 3)
        want = q[wide].sum() + k[narrow].sum() + v[narrow].sum() + o[:, wide].sum()
        assert scores["key_value"][group] == pytest.approx(float(want))
    for channel in range(5):
        want = gate[channel].sum() + up[channel].sum() + down[:, channel].sum()
        assert scores["intermediate"][channel] == pytest.approx(float(want))


def test_selection_keeps_the_highest_and_breaks_ties_low():
    scores = {
        "key_value": torch.tensor([1.0, 3.0, 3.0, 0.0]),
        "intermediate": torch.tensor([2.0, 2.0, 2.0]),
    }
    after = LayerGeometry(4, 2, 8, 2)
    keep = keep_highest(LayerToPrune(0, after, after, scores, 42))
    assert keep == LayerKeep((1, 2), (0, 1))


def test_random_draws_are_seeded_by_layer():
    after = narrowed(LAYER, 0.5)
    draw = keep_random(LayerToPrune(3, LAYER, after, None, 7))
    assert draw == keep_random(LayerToPrune(3, LAYER, after, None, 7))
    assert draw != keep_random(LayerToPrune(4, LAYER, after, None, 7))
    assert len(draw.intermediate) == after.intermediate_size
    assert list(draw.intermediate) == sorted(set(draw.intermediate))


def test_l2_sums_the_squares_of_all_chunks():
    weight = torch.randn(20, 6, dtype=torch.bfloat16)
    by_row, by_column = l2_sums(weight.split(7))
    squares = weight.double().square()
    torch.testing.assert_close(by_row, squares.sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(by_column, squares.sum(0), rtol=1e-6, atol=0)
