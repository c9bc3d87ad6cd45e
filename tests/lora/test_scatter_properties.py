"""Slicing and scattering undo each other, for any indices, shapes and types."""

import tempfile
from pathlib import Path

import pytest
import torch
from helpers.family_models import PLAIN_FAMILIES
from helpers.variants import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loram_cli.arch.registry import family_for
from loram_cli.arch.spec import PRUNED_AXES
from loram_cli.checkpoint import reader
from loram_cli.checkpoint.header import DTYPES
from loram_cli.checkpoint.index import SINGLE_NAME, CheckpointIndex
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.lora.scatter import gather, scatter_columns, scatter_rows
from loram_cli.pruning.groups import LayerKeep
from loram_cli.pruning.slicing import read_kept, split_parameter_name

FAMILIES = sorted(family.model_types[0] for family in PLAIN_FAMILIES)
FLOATS = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
RANKS = st.integers(1, 4)


@st.composite
def kept_rows(draw) -> tuple[list[int], int]:
    full = draw(st.integers(1, 40))
    return sorted(draw(st.sets(st.integers(0, full - 1), min_size=1))), full


def whole_numbers(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Small ones and none of them 0: their products and sums are exact in every type."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 4, shape, generator=generator).to(dtype)


SEEDS = st.integers(0, 2**20)


@given(kept_rows(), RANKS, FLOATS, SEEDS)
def test_scattered_rows_come_back_and_all_others_are_zero(kept, rank, dtype, seed):
    rows, full = kept
    factor = whole_numbers(len(rows), rank, seed=seed, dtype=dtype)
    wide = scatter_rows(factor, rows, full)
    assert (wide.dtype, tuple(wide.shape)) == (dtype, (full, rank))
    assert torch.equal(gather(wide, rows, None), factor)
    others = [i for i in range(full) if i not in rows]
    assert not wide[others].any()
    assert torch.equal(scatter_columns(factor.T, rows, full), wide.T)
    assert scatter_columns(factor.T, rows, full).is_contiguous()


@given(kept_rows(), kept_rows(), RANKS, FLOATS, SEEDS)
def test_the_product_of_scattered_factors_is_the_product_scattered(out, into, rank, dtype, seed):
    (rows, full_rows), (columns, full_columns) = out, into
    lora_b = whole_numbers(len(rows), rank, seed=seed, dtype=dtype)
    lora_a = whole_numbers(rank, len(columns), seed=seed + 1, dtype=dtype)
    product = scatter_rows(lora_b, rows, full_rows) @ scatter_columns(lora_a, columns, full_columns)
    wanted = torch.zeros(full_rows, full_columns, dtype=dtype)
    wanted[torch.tensor(rows)[:, None], torch.tensor(columns)] = lora_b @ lora_a
    assert torch.equal(product, wanted)
    assert torch.equal(gather(product, rows, columns), lora_b @ lora_a)


@given(st.data(), kept_rows())
def test_indices_that_are_not_rising_within_the_full_shape_are_refused(data, kept):
    rows, full = kept
    what = data.draw(st.sampled_from(["above", "below", "twice", "order", "fewer"]))
    wrong = list(rows)
    place = data.draw(st.integers(0, len(rows) - 1))
    if what == "above":
        wrong[-1] = full + data.draw(st.integers(0, 3))
    elif what == "below":
        wrong[0] = -data.draw(st.integers(1, full))
    elif what == "twice":
        wrong.insert(place, wrong[place])
    elif what == "order":
        wrong.append(data.draw(st.integers(0, wrong[-1])))
    count = len(wrong) - 1 if what == "fewer" else len(wrong)
    with pytest.raises(ValueError, match=r"kept indices"):
        scatter_rows(torch.ones(count, 2), wrong, full)
    with pytest.raises(ValueError, match=r"kept indices"):
        scatter_columns(torch.ones(2, count), wrong, full)


@st.composite
def models(draw) -> tuple[dict, dict[int, LayerKeep]]:
    """A config of any family, and what is kept of some of its layers."""
    kv = draw(st.integers(1, 3))
    config = {
        **TINY, "model_type": draw(st.sampled_from(FAMILIES)), "vocab_size": 5,
        "num_key_value_heads": kv, "num_attention_heads": kv * draw(st.integers(1, 3)),
        "head_dim": draw(st.integers(1, 3)), "intermediate_size": draw(st.integers(1, 9)),
        "hidden_size": draw(st.integers(1, 7)), "num_hidden_layers": 2,
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False,
    }  # fmt: skip

    def some(count):
        return tuple(sorted(draw(st.sets(st.integers(0, count - 1), min_size=1))))

    layers = draw(st.sets(st.integers(0, 1)))
    return config, {i: LayerKeep(some(kv), some(config["intermediate_size"])) for i in layers}


def by_axes(keep, module_axes, geometry, full: int) -> list[int]:
    """Which of the full indices stay, told by asking each one what it belongs to."""
    if not module_axes:
        return list(range(full))
    kept, start = [], 0
    per_group = geometry.num_attention_heads // geometry.num_key_value_heads
    widths = {
        "query": per_group * geometry.head_dim, "query_heads": per_group,
        "key_value": geometry.head_dim, "key_value_heads": 1, "intermediate": 1,
    }  # fmt: skip
    for axis in module_axes:
        width = widths[axis]
        groups = keep.intermediate if axis == "intermediate" else keep.key_value_heads
        units = geometry.axis_units(axis)
        kept += [start + i for i in range(units) if i // width in groups]
        start += units
    assert start == full
    return kept


@settings(max_examples=60)
@given(models(), st.sampled_from(sorted(DTYPES)), st.integers(1, 64), SEEDS)
def test_a_pruned_checkpoint_is_the_kept_part_of_the_base(model, type_name, chunk_bytes, seed):
    """Every tensor of every family, the fused ones and the biases too, bit for bit."""
    config, keep = model
    family = family_for(config, "test")
    geometry = family.geometry(config)
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[type_name].to_torch()
    stored = {}
    for name, shape in family.tensor_shapes(config).items():
        # A scalar has no axis.
        rows, *rest = shape or (1,)
        width = rest[0] if rest else 1
        high = 2 if dtype == torch.bool else 256
        raw = torch.randint(
            high, (rows, width * dtype.itemsize), dtype=torch.uint8, generator=generator
        )
        stored[name] = raw.view(dtype).reshape(shape)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(reader, "_GAP_BYTES", chunk_bytes // 2)
        save_file(stored, Path(folder) / SINGLE_NAME)
        with TensorReader(CheckpointIndex.open(Path(folder)), finite=False) as opened:
            for name, full in stored.items():
                pieces = list(read_kept(opened, name, family, geometry, keep))
                found = torch.cat(pieces) if full.dim() else pieces[0]
                wanted = expected(name, full, family, geometry, keep)
                assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
                bits = [t.reshape(-1).view(torch.uint8) for t in (found, wanted)]
                assert torch.equal(*bits), name


def expected(name, full, family, geometry, keep):
    other = family.tensor_named(name)
    if other is not None and other[0] in keep and PRUNED_AXES.intersection(other[1].shape[:1]):
        index, tensor = other
        rows = by_axes(keep[index], tensor.shape[:1], geometry.layers[index], full.shape[0])
        return full[rows].contiguous()
    module_name, kind = split_parameter_name(name)
    found = family.module_named(module_name)
    if found is None or found[0] not in keep:
        return full
    index, module = found
    layer = geometry.layers[index]
    rows = by_axes(keep[index], module.rows, layer, full.shape[0])
    if kind == "bias":
        return full[rows].contiguous()
    columns = by_axes(keep[index], module.columns, layer, full.shape[1])
    return full[rows][:, columns].contiguous()


@given(models(), RANKS, SEEDS)
def test_recovered_factors_slice_back_to_the_small_ones_in_every_module(model, rank, seed):
    config, keep = model
    family = family_for(config, "test")
    geometry = family.geometry(config)
    shapes = family.tensor_shapes(config)
    for index, kept in keep.items():
        layer = geometry.layers[index]
        small = family.layer_shapes(index, kept.widths(layer), config)
        for module in family.modules:
            name = f"{family.layer_prefix(index)}{module.name}.weight"
            lora_b = whole_numbers(small[name][0], rank, seed=seed, dtype=torch.float32)
            lora_a = whole_numbers(rank, small[name][1], seed=seed, dtype=torch.float32)
            rows, columns = kept.rows(module, layer), kept.columns(module, layer)
            wide_b = lora_b if rows is None else scatter_rows(lora_b, rows, shapes[name][0])
            wide_a = lora_a
            if columns is not None:
                wide_a = scatter_columns(lora_a, columns, shapes[name][1])
            assert tuple((wide_b @ wide_a).shape) == shapes[name]
            part = gather(wide_b @ wide_a, rows, columns)
            assert torch.equal(part, lora_b @ lora_a)
            # Whole numbers above 0: what is not zero is what was kept, and no more.
            assert int((wide_b @ wide_a).count_nonzero()) == lora_b.shape[0] * lora_a.shape[1]
