"""Plan arithmetic on any geometry: against the paper's formula in exact fractions."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from helpers.family_models import PLAIN_FAMILIES
from helpers.variants import TINY
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from loram_cli.arch.registry import family_for
from loram_cli.arch.spec import Geometry, LayerGeometry
from loram_cli.errors import UsageError
from loram_cli.memory.account import count_params
from loram_cli.memory.setup import TrainingSetup
from loram_cli.pruning.budget import card_bytes, largest_ratio, smallest_ratio
from loram_cli.pruning.groups import LayerKeep, params_per_group
from loram_cli.pruning.plan import layer_widths, narrowed, per_layer_config, pruned_config
from loram_cli.pruning.rand import keep_random
from loram_cli.pruning.ratios import RatioPlan
from loram_cli.pruning.select import keep_global
from loram_cli.pruning.strategy import LayerToPrune
from loram_cli.pruning.stru import keep_highest

FAMILIES = sorted({kind for family in PLAIN_FAMILIES for kind in family.model_types})
# Ratios as people and the budget write them: decimals of up to five digits.
DECIMALS = st.integers(1, 99_999).map(lambda n: (n, n / 100_000))
RATIOS = st.floats(0, 1, exclude_max=True)


@st.composite
def layers(draw, most_channels: int = 30_000) -> LayerGeometry:
    kv = draw(st.integers(1, 128))
    return LayerGeometry(
        num_attention_heads=kv * draw(st.integers(1, 16)),
        num_key_value_heads=kv,
        head_dim=draw(st.sampled_from([1, 2, 12, 64, 128])),
        intermediate_size=draw(st.integers(1, most_channels)),
    )


@given(layers(), DECIMALS)
@example(LayerGeometry(40, 20, 64, 20), (95_000, 0.95))
@example(LayerGeometry(64, 8, 128, 28_672), (95_000, 0.95))
@example(LayerGeometry(40, 40, 128, 13_824), (65_000, 0.65))
@example(LayerGeometry(100, 100, 1, 100), (29_000, 0.29))
def test_kept_counts_are_the_papers_formula(layer, ratio):
    numerator, ratio = ratio
    exact = Fraction(numerator, 100_000)
    kv, channels = layer.num_key_value_heads, layer.intermediate_size
    kept_heads = kv - math.floor(kv * exact)
    kept_channels = math.floor(channels * (1 - exact))
    assert kept_heads >= 1
    if kept_channels < 1:
        with pytest.raises(UsageError, match="0 MLP channels"):
            narrowed(layer, ratio)
        return
    after = narrowed(layer, ratio)
    assert after.num_key_value_heads == kept_heads
    assert after.intermediate_size == kept_channels
    # Query heads go with their key/value head, and nothing else changes.
    groups = layer.num_attention_heads // kv
    assert after.num_attention_heads == kept_heads * groups
    assert after.head_dim == layer.head_dim


@given(layers(), RATIOS, st.integers(1, 200))
def test_channels_are_rounded_up_to_a_multiple_and_to_no_more_than_there_are(layer, ratio, n):
    try:
        exact = narrowed(layer, ratio)
    except UsageError:
        assume(False)
    after = narrowed(layer, ratio, multiple_of=n)
    assert replace(after, intermediate_size=exact.intermediate_size) == exact
    assert exact.intermediate_size <= after.intermediate_size < exact.intermediate_size + n
    if after.intermediate_size < layer.intermediate_size:
        assert after.intermediate_size % n == 0
    assert after.intermediate_size <= layer.intermediate_size


@given(layers(), RATIOS, RATIOS)
def test_a_higher_ratio_never_keeps_more_and_something_is_always_left(layer, one, other):
    low, high = sorted((one, other))
    try:
        narrow = narrowed(layer, high)
    except UsageError:
        assume(False)
    wide = narrowed(layer, low)
    assert layer.num_key_value_heads >= wide.num_key_value_heads >= narrow.num_key_value_heads >= 1
    assert layer.intermediate_size >= wide.intermediate_size >= narrow.intermediate_size >= 1
    assert narrowed(layer, 0.0) == layer


@given(layers(), RATIOS, RATIOS)
def test_heads_and_mlp_have_ratios_of_their_own(layer, heads, mlp):
    try:
        after = narrowed(layer, heads, mlp)
    except UsageError:
        assume(False)
    # Beside an MLP, or heads, that the other ratio cannot empty.
    by_heads = narrowed(replace(layer, intermediate_size=2**60), heads)
    by_mlp = narrowed(LayerGeometry(2**40, 2**40, 1, layer.intermediate_size), mlp)
    assert after.num_key_value_heads == by_heads.num_key_value_heads
    assert after.intermediate_size == by_mlp.intermediate_size


@given(
    st.lists(layers(), min_size=1, max_size=8), st.integers(0, 5), st.integers(0, 5), RATIOS
)  # fmt: skip
def test_the_first_and_last_layers_stay_whole(stack, keep_first, keep_last, ratio):
    geometry = Geometry(64, 100, False, tuple(stack))
    if keep_first + keep_last >= len(stack):
        with pytest.raises(UsageError, match="leaves none to prune"):
            layer_widths(geometry, ratio, keep_first, keep_last)
        return
    try:
        after = layer_widths(geometry, ratio, keep_first, keep_last)
    except UsageError as error:
        assert "MLP channels" in error.message
        return
    last = len(stack) - keep_last
    for i, layer in enumerate(stack):
        assert after[i] == (narrowed(layer, ratio) if keep_first <= i < last else layer)
    changed = per_layer_config(geometry, after)
    assert set(changed) == {str(i) for i, layer in enumerate(stack) if after[i] != layer}


@given(st.data())
def test_a_plan_file_gives_each_layer_what_it_says(data):
    count = data.draw(st.integers(1, 10))
    stack = tuple(data.draw(layers(most_channels=300)) for _ in range(count))
    ratio = st.integers(0, 9).map(lambda n: n / 10)
    named = data.draw(
        st.dictionaries(st.integers(0, count - 1), st.tuples(ratio, ratio), min_size=1)
    )
    plan = RatioPlan.from_mapping(
        {"layers": {i: {"heads": heads, "mlp": mlp} for i, (heads, mlp) in named.items()}}, "plan"
    )
    try:
        after = plan.widths(Geometry(64, 100, False, stack), 4, 2)
    except UsageError as error:
        assert "0 MLP channels" in error.message
        return
    for i, layer in enumerate(stack):
        assert after[i] == (narrowed(layer, *named[i]) if i in named else layer)


@st.composite
def keeps(draw) -> tuple[LayerGeometry, LayerKeep]:
    layer = draw(layers(most_channels=60))
    heads = draw(st.sets(st.integers(0, layer.num_key_value_heads - 1), min_size=1))
    channels = draw(st.sets(st.integers(0, layer.intermediate_size - 1), min_size=1))
    return layer, LayerKeep(tuple(sorted(heads)), tuple(sorted(channels)))


@given(keeps(), st.sampled_from(FAMILIES))
def test_groups_stay_whole_in_every_tensor(kept, model_type):
    layer, keep = kept
    family = family_for({"model_type": model_type}, "test")
    after = keep.widths(layer)
    width = layer.head_dim
    per_group = layer.num_attention_heads // layer.num_key_value_heads * width
    whole = {
        "query": {g: range(g * per_group, (g + 1) * per_group) for g in keep.key_value_heads},
        "key_value": {g: range(g * width, (g + 1) * width) for g in keep.key_value_heads},
        "intermediate": {c: range(c, c + 1) for c in keep.intermediate},
    }
    for module in family.modules:
        for axes, found in (
            (module.rows, keep.rows(module, layer)), (module.columns, keep.columns(module, layer)),
        ):  # fmt: skip
            if not axes:
                assert found is None
                continue
            start, want = 0, []
            for axis in axes:
                want += [start + i for group in whole[axis].values() for i in group]
                start += layer.axis_units(axis)
            assert found == want
            assert len(found) == sum(after.axis_units(axis) for axis in axes)
            assert found == sorted(set(found))
            assert set(found) <= set(range(start))


@given(keeps())
def test_what_is_kept_survives_the_manifest(kept):
    _, keep = kept
    assert LayerKeep.from_mapping(keep.to_mapping()) == keep


@given(st.data(), RATIOS, st.integers(0, 2**31), st.integers(0, 200))
def test_selections_are_of_the_wanted_size(data, ratio, seed, index):
    before = data.draw(layers(most_channels=60))
    try:
        after = narrowed(before, ratio)
    except UsageError:
        assume(False)
    few = st.sampled_from([0.0, 0.5, 1.0, 2.0])  # so that there are ties
    draw = {
        "key_value": before.num_key_value_heads, "intermediate": before.intermediate_size,
    }  # fmt: skip
    scores = {
        kind: torch.tensor(data.draw(st.lists(few, min_size=n, max_size=n)))
        for kind, n in draw.items()
    }
    layer = LayerToPrune(index, before, after, scores, seed)
    for keep in (keep_highest(layer), keep_random(layer)):
        assert keep.widths(before) == after
        for found, total in (
            (keep.key_value_heads, before.num_key_value_heads),
            (keep.intermediate, before.intermediate_size),
        ):
            assert list(found) == sorted(set(found))
            assert set(found) <= set(range(total))
    best = keep_highest(layer)
    for kind, found in (("key_value", best.key_value_heads), ("intermediate", best.intermediate)):
        values = scores[kind].tolist()
        # By score, then by index: a lower one never goes where a higher one stays.
        ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
        assert set(found) == set(ranked[: len(found)])


@given(st.data())
def test_a_global_ranking_removes_what_is_asked_for_and_no_group_more(data):
    amount = st.sampled_from([0.0, 0.25, 1.0, 3.0])
    scores, freed = {}, {}
    for i in range(data.draw(st.integers(1, 4))):
        freed[i] = {k: data.draw(st.integers(1, 50)) for k in ("key_value", "intermediate")}
        scores[i] = {
            kind: torch.tensor(
                data.draw(st.lists(amount, min_size=1, max_size=8)), dtype=torch.float64
            )
            for kind in ("key_value", "intermediate")
        }
    total = sum(freed[i][k] * len(v) for i, s in scores.items() for k, v in s.items())
    remove = data.draw(st.integers(0, total + 10))
    multiple_of = data.draw(st.sampled_from([1, 1, 2, 3, 5]))
    keep = keep_global(scores, freed, remove, multiple_of)

    def left(kept):
        return sum(
            freed[i]["key_value"] * len(k.key_value_heads)
            + freed[i]["intermediate"] * len(k.intermediate)
            for i, k in kept.items()
        )

    assert all(k.key_value_heads and k.intermediate for k in keep.values())
    removed = total - left(keep)
    whole = {i: len(layer["intermediate"]) for i, layer in scores.items()}
    for i, k in keep.items():
        assert len(k.intermediate) == whole[i] or len(k.intermediate) % multiple_of == 0
    least = sum(
        f["key_value"] + min(multiple_of, whole[i]) * f["intermediate"] for i, f in freed.items()
    )
    if remove > total - least:
        assert removed == total - least
    else:
        largest = max(max(f["key_value"], f["intermediate"] * multiple_of) for f in freed.values())
        assert remove <= removed < remove + largest
    more = keep_global(scores, freed, remove + 1, multiple_of)
    for i in keep:
        assert set(more[i].key_value_heads) <= set(keep[i].key_value_heads)
        assert set(more[i].intermediate) <= set(keep[i].intermediate)


def model_config(data, model_type: str) -> dict:
    kv = data.draw(st.integers(1, 6))
    return {
        **TINY, "model_type": model_type, "num_key_value_heads": kv,
        "num_attention_heads": kv * data.draw(st.integers(1, 3)),
        "head_dim": data.draw(st.integers(1, 6)) * 2,
        "intermediate_size": data.draw(st.integers(1, 150)),
        "num_hidden_layers": data.draw(st.integers(1, 5)),
        "tie_word_embeddings": data.draw(st.booleans()),
    }  # fmt: skip


@settings(max_examples=60)
@given(st.data(), st.sampled_from(FAMILIES), st.sampled_from(["params", "bf16", "nf4"]))
def test_a_budget_is_never_exceeded_and_the_next_wider_model_would_exceed_it(
    data, model_type, unit
):
    config = model_config(data, model_type)
    family = family_for(config, "test")
    geometry = family.geometry(config)

    def cost(widths):
        pruned = pruned_config(config, geometry, widths)
        if unit == "params":
            return count_params(family, pruned).total
        quantize = None if unit == "bf16" else unit
        return card_bytes(family, pruned, TrainingSetup(rank=2, quantize=quantize, length=8))

    n = data.draw(st.sampled_from([1, 1, 3, 8]))
    least = layer_widths(geometry, largest_ratio(geometry), 0, 0, n)
    assert {layer.intermediate_size for layer in least} == {min(n, config["intermediate_size"])}
    lowest, highest = cost(least), cost(geometry.layers)
    assume(lowest < highest)
    budget = data.draw(st.integers(lowest - 5, highest - 1))
    ratio = smallest_ratio(geometry, 0, 0, lambda widths: cost(widths) <= budget, n)
    if budget < lowest:
        assert ratio is None
        return
    found = cost(layer_widths(geometry, ratio, 0, 0, n))
    assert found <= budget
    # Every ratio below it in steps of 1e-5 is too much: the nearest, and any other one.
    below = [round(ratio - 1e-5, 5), *(data.draw(st.floats(0, ratio)) for _ in range(2))]
    for other in below:
        other = math.floor(other * 100_000 - 1e-6) / 100_000
        if 0 <= other < ratio:
            assert cost(layer_widths(geometry, other, 0, 0, n)) > budget


@given(st.data(), st.sampled_from(FAMILIES))
def test_what_a_group_frees_adds_up_to_what_is_removed(data, model_type):
    config = model_config(data, model_type)
    family = family_for(config, "test")
    geometry = family.geometry(config)
    layer = geometry.layers[0]
    freed = params_per_group(family, config, layer)
    heads = data.draw(st.integers(1, layer.num_key_value_heads))
    channels = data.draw(st.integers(1, layer.intermediate_size))
    kept = LayerKeep(tuple(range(heads)), tuple(range(channels))).widths(layer)
    after = (kept, *geometry.layers[1:])
    removed = (
        count_params(family, config).total
        - count_params(family, pruned_config(config, geometry, after)).total
    )
    gone = {
        "key_value": layer.num_key_value_heads - heads,
        "intermediate": layer.intermediate_size - channels,
    }
    assert removed == sum(gone[kind] * freed[kind] for kind in gone)
