"""A causal LM that several processes share out: each holds a slice of every weight (FSDP).

A decoder layer is whole on a process only while it is at work. It is read, quantized, and cut into
slices before the next one is read, so that no process ever holds the model: one that exceeds a GPU
can be loaded. torch's ``fully_shard`` is used as it is; accelerate's wrapper around it knows no
CPUs, and loads the whole model on the first process.

Source: Zhao et al., PyTorch FSDP (arXiv 2304.11277), in its second form (``fully_shard``).
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from loram_cli.checkpoint.reader import TensorReader
from loram_cli.checkpoint.writer import ShardedWriter, TensorPlan
from loram_cli.modeling.skeleton import SkeletonModel, fill
from loram_cli.reporting import Reporter
from loram_cli.runs.processes import is_main_process, process_count


class SharedModel(SkeletonModel):
    """A model in two steps: first its modules, for LoRA to be attached to, then its weights."""

    # FSDP makes parameters of its slices, which torch allows only for floating point types.
    nf4_storage = torch.bfloat16

    def load(self, root: Any, reporter: Reporter) -> None:
        """Read the weights part by part, and keep this process's slices of them.

        Every process of the group must call it.

        Args:
            root: :attr:`model`, or the PEFT model around it, whose factors are sliced as well.
            reporter: Told of progress.

        Raises:
            LoramError: A tensor is absent or of another shape.
        """
        from torch.distributed.device_mesh import init_device_mesh

        kind = torch.device(self.device).type
        mesh = init_device_mesh(kind, (process_count(),))
        parts = list(self.layers())
        embedding = self.untied_embedding()
        if embedding is not None:
            parts.append(embedding)
        done = {slot.tensor for _, slots in parts for slot in slots}
        rest = [slot for name, slot in self.slots.items() if name not in done]
        with (
            TensorReader(self.index) as reader,
            reporter.progress("load", self.index.num_bytes / 2**20, "MiB") as progress,
        ):
            for part, slots in [*parts, (root, rest)]:
                for slot in slots:
                    # Block constants stay whole on every process: an eighth of a bit per weight.
                    fill(slot, self.read(slot, reader))
                    progress.advance(self.index.tensors[slot.tensor].num_bytes / 2**20)
                # The root stays whole from its forward pass to the end of the backward pass: the
                # head runs more or less often on each process, and gathers must match.
                fully_shard(part, mesh=mesh, reshard_after_forward=part is not root)
        # What is sliced now is not filled again; stand-ins and places are of no use any more.
        self.slots.clear()
        if kind == "cpu":
            # gloo cannot average; this sums, and divides afterwards.
            for module in sharded_modules(root):
                module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: Any) -> list[Any]:
    """The modules whose weights are gathered together; none unless the model is shared out."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_shared(model: Any) -> bool:
    """Whether the model is shared out among the processes."""
    return isinstance(model, FSDPModule)


def release_gathered(model: Any) -> None:
    """Give up every weight that an evaluation left whole."""
    for module in sharded_modules(model):
        module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A weight with all its slices; every process must ask for the same one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_whole(model: Any, out: Path, dtype: torch.dtype) -> None:
    """Write a model that is shared out as a Hugging Face directory's safetensors.

    One tensor at a time is whole; every process must call it, and the first one writes.
    """
    parameters = dict(model.named_parameters())
    with ExitStack() as stack:
        writer = None
        if is_main_process():
            plan = {name: TensorPlan(dtype, tuple(p.shape)) for name, p in parameters.items()}
            writer = stack.enter_context(ShardedWriter(out, plan))
        for name, parameter in parameters.items():
            tensor = whole(parameter.detach())
            if writer is not None:
                writer.write(name, tensor.to("cpu", dtype))


def whole_trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """Every trained weight by name, on the CPU; every process must call it."""
    return {
        name: whole(parameter.detach()).cpu()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
