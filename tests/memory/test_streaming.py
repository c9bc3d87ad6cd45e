"""The account of training layer by layer against what is really held and moved on the CPU."""

from concurrent.futures import Executor, Future
from dataclasses import replace

import pytest
import torch
from helpers.tensor_storage import LiveStorage

from loram_cli.arch.registry import family_for
from loram_cli.memory.presets import load_preset
from loram_cli.memory.setup import TrainingSetup
from loram_cli.memory.streaming import layer_bytes, step_traffic, streamed_training_memory
from loram_cli.memory.training import training_memory
from loram_cli.modeling import layer_feed
from loram_cli.modeling.layerwise import lora_pass
from loram_cli.modeling.random_model import random_causal_lm
from loram_cli.modeling.skeleton import SkeletonModel
from loram_cli.reporting import NullReporter
from loram_cli.training.adapters import attach_lora, lora_config
from loram_cli.units import GIB

CONFIG = {
    "model_type": "llama", "vocab_size": 900, "hidden_size": 128, "intermediate_size": 344,
    "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 48,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 256,
}  # fmt: skip
FAMILY = family_for(CONFIG, "test")
SETUP = TrainingSetup(rank=4, micro_batch=2, length=96, device="cpu", precision="fp32")


class AtOnce(Executor):
    """Does what it is asked for at once, on the thread that asks, where it is counted."""

    def __init__(self, *_):
        pass

    def submit(self, work, /, *args):
        done = Future()
        try:
            done.set_result(work(*args))
        except Exception as error:
            done.set_exception(error)
        return done


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    random_causal_lm(FAMILY, CONFIG, dtype=torch.float32, device="cpu").save_pretrained(directory)
    return directory


def measured(directory, setup, micro_batches, monkeypatch, **how):
    """The highest mark of live storage beside factors and optimizer, and bytes of a second step."""
    monkeypatch.setattr(layer_feed, "ThreadPoolExecutor", AtOnce)
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    skeleton = SkeletonModel(directory, dtype=dtype, device="cpu", nf4=setup.quantize == "nf4")
    targets = [*FAMILY.lora_targets, FAMILY.lm_head_target]
    lora = lora_config(targets, rank=setup.rank, dropout=setup.dropout)
    model = attach_lora(skeleton.model, lora, seed=0)
    model.config.use_cache = False
    generator = torch.Generator().manual_seed(0)
    shape = (setup.micro_batch, setup.length)
    ids = [torch.randint(2, 900, shape, generator=generator) for _ in range(micro_batches)]
    batches = [{"input_ids": some, "labels": some} for some in ids]

    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=setup.precision == "bf16")

    items = micro_batches * setup.micro_batch * (setup.length - 1)
    stand_ins = [p for p in model.parameters() if not p.requires_grad]
    with (
        LiveStorage(*stand_ins, *(p for p in model.parameters() if p.requires_grad)) as live,
        lora_pass.streamed_lora(skeleton, model, NullReporter(), **how) as passes,
    ):
        passes.accumulate(batches, items, autocast=autocast)
        before = passes.source.loaded_bytes
        passes.accumulate(batches, items, autocast=autocast)
    return live.peak, passes.source.loaded_bytes - before


def case(micro_batches=4, stay=0, offload=False, slow=False, **changes):
    name = "-".join(f"{k}={v}" for k, v in changes.items())
    return pytest.param(
        replace(SETUP, **changes), micro_batches, stay, offload,
        id=f"{name or 'plain'}-{micro_batches}-stay={stay}-offload={offload}",
        marks=pytest.mark.slow if slow else (),
    )  # fmt: skip


CASES = [
    case(), case(stay=2), case(offload=True), case(quantize="nf4"),
    case(1, slow=True), case(16, slow=True), case(stay=5, slow=True),
    case(dropout=0.0, slow=True), case(precision="bf16", slow=True),
    case(micro_batch=4, slow=True), case(length=40, micro_batches=8, slow=True),
    case(precision="bf16", quantize="nf4", micro_batches=8, slow=True),
]  # fmt: skip


@pytest.mark.parametrize(("setup", "micro_batches", "stay", "offload"), CASES)
def test_predicted_peak_and_bytes_are_those_of_two_real_steps(
    checkpoint, tmp_path, monkeypatch, setup, micro_batches, stay, offload
):
    if setup.quantize:
        pytest.importorskip("bitsandbytes")
    place = tmp_path if offload else "device"
    peak, moved = measured(
        checkpoint, setup, micro_batches, monkeypatch, stay=stay, activations=place
    )
    how = {"stay": stay, "offload_activations": offload}
    predicted = streamed_training_memory(FAMILY, CONFIG, setup, micro_batches, **how)
    expected = predicted.allocated - predicted.adapter - predicted.optimizer
    assert expected == pytest.approx(peak, rel=0.05)
    assert step_traffic(FAMILY, CONFIG, setup, micro_batches, **how).device_bytes == moved


def seventy_b():
    config = load_preset("llama2-70b")
    return family_for(config, "70b"), config


def test_a_70b_is_trained_exactly_in_24_gib_and_reads_its_layers_twice_a_step():
    family, config = seventy_b()
    setup = TrainingSetup(micro_batch=4, length=512, quantize="nf4")
    resident = replace(setup, gradient_checkpointing=True)
    assert training_memory(family, config, resident).smallest_card_gib == 48
    memory = streamed_training_memory(
        family, config, setup, 32, offload_activations=True, host_copies=True
    )
    assert memory.fits(24 * GIB)
    assert memory.total < 16 * GIB
    layers = layer_bytes(family, config, setup)
    # Hidden states of 32 micro-batches of 2048 tokens in bf16, at 80 boundaries.
    assert memory.host == sum(layers) + 80 * 32 * 2048 * 8192 * 2
    few, many = (
        step_traffic(family, config, setup, n, host_copies=True, offload_activations=True)
        for n in (1, 32)
    )
    assert few.device_bytes == many.device_bytes == sum(layers[2:]) + sum(layers[:-2])
    assert many.state_bytes == 32 * few.state_bytes
    assert few.disk_bytes == 0
    assert many.flops == pytest.approx(32 * 6 * 68.7e9 * 2048, rel=0.01)


def test_without_copies_the_checkpoint_is_read_as_it_is_stored():
    family, config = seventy_b()
    setup = TrainingSetup(quantize="nf4")
    traffic = step_traffic(family, config, setup, 8, stored_bytes=2)
    stored = layer_bytes(family, config, replace(setup, quantize=None))
    assert traffic.disk_bytes == sum(stored[2:]) + sum(stored[:-2])
    assert traffic.disk_bytes > 3 * traffic.device_bytes
    assert traffic.state_bytes == 0


def test_the_slowest_of_computing_copying_and_reading_is_a_steps_time():
    family, config = seventy_b()
    setup = TrainingSetup(quantize="nf4", micro_batch=1)
    slow = {"device_bandwidth": 50e9, "disk_bandwidth": 3e9, "flops_per_second": 400e12}

    def seconds(micro_batches, start_seconds=0.0, **how):
        traffic = step_traffic(family, config, setup, micro_batches, **how)
        return traffic.seconds(**slow, start_seconds=start_seconds)

    # One micro-batch waits for the bus or the disk, many for the arithmetic.
    assert seconds(1, host_copies=True) == pytest.approx(2 * 35e9 / 50e9, rel=0.05)
    assert seconds(1) == pytest.approx(2 * 2 * 68.5e9 / 3e9, rel=0.05)
    assert seconds(64, host_copies=True) == pytest.approx(6 * 68.7e9 * 64 * 512 / 400e12, rel=0.01)
    # Or for the processor: 80 layers, started twice in each of 64 passes, NF4's more kernels each.
    assert seconds(64, 6e-3, host_copies=True) == pytest.approx(80 * 2 * 1.4 * 64 * 6e-3)


def test_hidden_states_beside_the_device_and_layers_that_stay_trade_one_for_the_other():
    plain = streamed_training_memory(FAMILY, CONFIG, SETUP, 8)
    beside = streamed_training_memory(FAMILY, CONFIG, SETUP, 8, offload_activations=True)
    assert plain.boundaries == plain.total - beside.total == beside.host
    layer = layer_bytes(FAMILY, CONFIG, SETUP)[0]
    assert plain.layers == 2 * layer and plain.host == 0
    whole = streamed_training_memory(FAMILY, CONFIG, SETUP, 8, stay=5)
    assert whole.layers == 0 and whole.weights == plain.weights + 3 * layer
