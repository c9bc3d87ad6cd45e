"""Training memory of whole models, beside the paper's measurements, and what fits a card."""

from dataclasses import replace

import pytest

from loram_cli.arch.registry import family_for
from loram_cli.memory.account import nf4_tensor_bytes
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


def test_each_of_several_processes_holds_its_slices_and_what_is_whole_at_a_time():
    family, config = model("llama2-7b")
    alone = training_memory(family, config, PAPER)
    shared = training_memory(family, config, replace(PAPER, processes=4))
    # Attention, MLP and two norms of a layer; final norm and head.
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    whole = 2 * (2 * layer + 4096 + 32000 * 4096)
    assert shared.weights == pytest.approx(alone.weights / 4 + whole, rel=1e-6)
    assert shared.state == pytest.approx(alone.state / 4, rel=1e-6)
    assert shared.activations == alone.activations


def test_a_tied_embedding_is_whole_with_the_head_and_block_maxima_are_whole_everywhere():
    shapes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
    config = {**load_preset("llama2-7b"), **shapes, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    family = family_for(config, "tiny")
    many = replace(PAPER, processes=10**9)
    untied = training_memory(family, config, many).weights
    tied = training_memory(family, {**config, "tie_word_embeddings": True}, many).weights
    layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    # A slice of every tensor is a byte here: nine for each layer, and three or two more.
    assert untied == 2 * (2 * layer + 64 + 512 * 64) + 21
    assert tied == untied - 1
    nf4 = training_memory(family, config, replace(many, quantize="nf4")).weights
    linears = layer - 2 * 64
    constants = sum(nf4_tensor_bytes(n) - n // 2 for n in [64 * 64] * 4 + [64 * 128] * 3)
    assert nf4 == linears + 2 * 2 * (2 * 64) + 2 * (64 + 512 * 64) + 21 + 2 * constants
