"""Training memory of whole models, beside the paper's measurements, and what fits a card."""

from dataclasses import replace

import pytest

from loram_cli.arch.registry import family_for
from loram_cli.memory.presets import load_preset
from loram_cli.memory.setup import TrainingSetup
from loram_cli.memory.training import largest, largest_micro_batch, optimizer_bytes, training_memory
from loram_cli.pruning.plan import layer_widths, pruned_config
from loram_cli.units import GIB, MIB

# Micro-batch 4, sequence 512, dropout 0.05 and plain losses, as the paper's code trains.
PAPER = TrainingSetup(cross_entropy="full")


def model(preset, ratio=0.0):
    config = load_preset(preset)
    family = family_for(config, preset)
    if ratio:
        geometry = family.geometry(config)
        config = pruned_config(config, geometry, layer_widths(geometry, ratio, 4, 2))
    return family, config


# The paper's peak was measured with another version of each library, and an allocator's rounding.
@pytest.mark.parametrize(
    ("preset", "ratio", "peak_mib"),
    [("llama2-7b", 0, 30517), ("llama2-13b", 0, 51661), ("llama2-13b", 0.65, 29799)],
)
def test_predictions_are_near_the_peaks_of_table_8(preset, ratio, peak_mib):
    predicted = training_memory(*model(preset, ratio), PAPER)
    assert predicted.total / MIB == pytest.approx(peak_mib, rel=0.06)


def test_limits_that_the_settings_for_small_cards_are_meant_for():
    small = replace(PAPER, cross_entropy="chunked", gradient_checkpointing=True)
    pruned = training_memory(*model("llama2-13b", 0.65), small)
    assert pruned.total < 16 * GIB and pruned.smallest_card_gib == 16
    tight = replace(small, quantize="nf4", micro_batch=1, optimizer="paged_adamw_8bit")
    assert training_memory(*model("llama2-70b", 0.85), tight).total < 12 * GIB


def test_parts_add_up_and_a_cpu_has_no_context():
    memory = training_memory(*model("llama3.1-8b"), PAPER)
    parts = (memory.weights, memory.state, memory.activations, memory.logits, memory.context)
    assert memory.total == sum(parts) and memory.allocated == memory.total - memory.context
    assert training_memory(*model("llama3.1-8b"), replace(PAPER, device="cpu")).context == 0


def test_largest_micro_batch_fits_and_the_next_does_not():
    family, config = model("llama2-13b", 0.65)
    found = largest_micro_batch(family, config, PAPER, 24 * GIB)
    assert found is not None

    def fits(micro_batch):
        setup = replace(PAPER, micro_batch=micro_batch)
        return training_memory(family, config, setup).fits(24 * GIB)

    assert fits(found) and not fits(found + 1)
    assert largest_micro_batch(*model("llama2-70b"), PAPER, 24 * GIB) is None


@pytest.mark.parametrize(("limit", "found"), [(0, None), (1, 1), (7, 7), (10, 10), (99, 10)])
def test_largest_number(limit, found):
    assert largest(lambda n: n <= limit, 10) == found


def test_eight_bit_moments_are_those_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.zeros(8, 5121))
    optimizer = bitsandbytes.optim.AdamW8bit([weight])
    optimizer.init_state(optimizer.param_groups[0], weight, 0, 0)
    state = optimizer.state[weight]
    held = sum(state[key].nbytes for key in ("state1", "state2", "absmax1", "absmax2"))
    assert optimizer_bytes(weight.numel(), "paged_adamw_8bit") == held
    assert optimizer_bytes(4095, "paged_adamw_8bit") == 2 * 4 * 4095
    assert optimizer_bytes(8 * 5121, "adamw") == 2 * 4 * 8 * 5121
