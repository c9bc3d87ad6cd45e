"""The account of whole models at their true shapes, against the same passes on tensors without data.

torch's fake tensors have shapes, types and storages with a length, and no memory: a 13B's forward
and backward pass runs on any machine, and what would be held is counted as it is for small models.
"""

import pytest
import torch
from helpers.checkpointing import enable_checkpointing
from helpers.tensor_storage import LiveStorage
from torch._subclasses.fake_tensor import FakeTensorMode

from loram_cli.arch.registry import family_for
from loram_cli.memory.setup import TrainingSetup
from loram_cli.memory.training import training_memory
from loram_cli.modeling.meta_model import meta_causal_lm, native_config
from loram_cli.tools.specs import BenchModel
from loram_cli.training.adapters import attach_lora, lora_config


def without_data(config, setup):
    """The model as it is trained, on the meta device."""
    family = family_for(config, "test")
    native = native_config(config, torch.bfloat16)
    model = meta_causal_lm(
        family, native, "meta", attn_implementation=setup.attention, dtype=torch.bfloat16
    )
    targets = [*family.lora_targets, family.lm_head_target]
    with torch.device("meta"):
        model = attach_lora(model, lora_config(targets, rank=setup.rank), seed=0).train()
    model.config.use_cache = False
    if setup.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def highest_mark(model, setup):
    """Bytes at the widest moment of two forward and backward passes, weights and factors included."""
    with FakeTensorMode(), LiveStorage() as live:
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                fake = torch.empty(weight.shape, dtype=weight.dtype)
                setattr(module, name, torch.nn.Parameter(fake, weight.requires_grad))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        ids = torch.zeros(setup.micro_batch, setup.length, dtype=torch.long)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
    return live.peak


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("row", ["llama2-7b", "llama2-13b:0.65", "llama3.1-70b:0.85"])
def test_predicted_memory_is_that_of_the_passes_at_the_models_true_shapes(row, checkpointing):
    config = BenchModel.parse(row).config()
    # padded: for tensors without data transformers makes a mask, as it does for padding.
    setup = TrainingSetup(
        padded=True, cross_entropy="full", gradient_checkpointing=checkpointing, device="cpu"
    )
    needed = training_memory(family_for(config, "test"), config, setup)
    counted = highest_mark(without_data(config, setup), setup)
    assert needed.allocated - needed.optimizer == pytest.approx(counted, rel=0.01)
