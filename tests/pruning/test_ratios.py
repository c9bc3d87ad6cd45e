import math

import pytest
from helpers.variants import VARIANTS

from loram_cli.arch.registry import family_for
from loram_cli.arch.spec import Geometry, LayerGeometry
from loram_cli.errors import UsageError
from loram_cli.pruning.budget import largest_ratio, smallest_ratio
from loram_cli.pruning.groups import LayerKeep, params_per_group
from loram_cli.pruning.plan import layer_widths
from loram_cli.pruning.ratios import RatioPlan

LAYER = LayerGeometry(8, 4, 8, 40)
GEOMETRY = Geometry(64, 100, False, (LAYER,) * 6)


def widths(data, keep_first=1, keep_last=1):
    plan = RatioPlan.from_mapping(data, "plan own.yaml")
    after = plan.widths(GEOMETRY, keep_first, keep_last)
    return [(layer.num_key_value_heads, layer.intermediate_size) for layer in after]


def test_a_plan_names_layers_and_ranges_and_leaves_the_rest_to_its_default():
    data = {
        "default": 0.5,
        "layers": {0: {"mlp": 0.25}, "2-3": {"heads": 0.75, "mlp": 0.9}, "4": 0},
    }
    assert widths(data) == [(4, 30), (2, 20), (1, 4), (1, 4), (4, 40), (4, 40)]
    assert widths(data, 0, 0)[5] == (2, 20)


def test_without_a_default_other_layers_stay_whole_however_few_there_are():
    assert widths({"layers": {"5": 0.5}}, 4, 2) == [(4, 40)] * 5 + [(2, 20)]


def test_query_heads_go_with_their_group():
    after = RatioPlan.from_mapping({"layers": {"0": 0.5}}, "x").widths(GEOMETRY, 0, 0)
    assert after[0].num_attention_heads == 4


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([0.5], "plan own.yaml: expected a mapping of layers to ratios"),
        ({}, "neither 'default' nor 'layers'"),
        ({"layer": {}}, "plan own.yaml: unknown key 'layer'\ndid you mean 'layers'"),
        ({"layers": {"2": {"head": 0.5}}}, "layers.2: unknown key 'head'\ndid you mean 'heads'"),
        ({"layers": {"2": {"heads": "much"}}}, "layers.2: heads: expected a number, not 'much'"),
        ({"layers": {"2": 1.0}}, "layers.2: heads: a ratio of 1.0 is outside"),
        ({"layers": {"2": {"mlp": -0.1}}}, "layers.2: mlp: a ratio of -0.1 is outside"),
        ({"layers": {"two": 0.5}}, "layers.two: not a layer"),
        ({"layers": {"0-99999999999999": 0.5}}, "layers.0-99999999999999: no model has so many"),
        ({"layers": {"9" * 5000: 0.5}}, "no model has so many layers"),
        ({"layers": {"3-2": 0.5}}, "layers.3-2: the range ends before it begins"),
        ({"layers": {"1-3": 0.5, "3": 0}}, "layers.3: layer 3 is in layers.1-3 already"),
        ({"layers": {"4-6": 0.5}}, "layers.4-6: the model's layers are 0 to 5"),
        ({"layers": {"1": {"mlp": 0.99}}}, "layers.1 leaves 4 key/value heads and 0 MLP channels"),
        ({"default": True}, "default: heads: expected a number"),
    ],
)
def test_what_is_wrong_in_a_plan_is_named_by_its_key(data, said):
    with pytest.raises(UsageError) as caught:
        widths(data)
    assert said in str(caught.value)


def test_the_smallest_ratio_is_the_first_of_all_that_fits():
    def size(after):
        return sum(7 * layer.num_key_value_heads + layer.intermediate_size for layer in after)

    for budget in (350, 300, 250, 190):
        found = smallest_ratio(GEOMETRY, 1, 1, lambda after, b=budget: size(after) <= b)
        assert found is not None
        # Ratios are tried in steps of 1e-5: what fits is all of them from the first one on.
        assert size(layer_widths(GEOMETRY, found, 1, 1)) <= budget
        assert size(layer_widths(GEOMETRY, found - 1e-5, 1, 1)) > budget


def test_a_budget_below_the_least_model_has_no_ratio():
    assert smallest_ratio(GEOMETRY, 1, 1, lambda after: False) is None
    least = layer_widths(GEOMETRY, largest_ratio(GEOMETRY), 1, 1)[1]
    assert (least.num_key_value_heads, least.intermediate_size) == (1, 1)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_a_group_frees_what_its_tensors_lose(variant):
    from helpers.variants import TINY

    config = {"model_type": variant.model_type, **TINY, **variant.changes}
    family = family_for(config, "test")
    before = family.geometry(config).layers[0]
    heads, channels = before.num_key_value_heads - 1, before.intermediate_size - 3
    keep = LayerKeep((0,), (0, 1, 2))

    def params(layer):
        return sum(math.prod(shape) for shape in family.layer_shapes(0, layer, config).values())

    freed = params_per_group(family, config, before)
    assert set(freed) == {
        *(["key_value"] if before.has_attention else []),
        *(["intermediate"] if before.has_mlp else []),
    }
    want = freed.get("key_value", 0) * heads + freed.get("intermediate", 0) * channels
    assert params(before) - params(keep.widths(before)) == want
