"""A causal LM that several processes share out: each holds a slice of every weight (FSDP).

A decoder layer is whole on a process only while it is at work. It is read, quantized, and cut into
slices before the next one is read, so that no process ever holds the model: one that exceeds a GPU
can be loaded. torch's ``fully_shard`` is used as it is; accelerate's wrapper around it knows no
CPUs, and loads the whole model on the first process.

Source: Zhao et al., PyTorch FSDP (arXiv 2304.11277), in its second form (``fully_shard``).
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.index import CheckpointIndex, read_config
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.checkpoint.writer import ShardedWriter, TensorPlan
from loram_cli.errors import LoramError
from loram_cli.modeling.empty import meta_causal_lm
from loram_cli.modeling.narrow import attention_kernel
from loram_cli.modeling.quantize import (
    keep_standard_layout,
    nf4_linear,
    nf4_weight,
    require_bitsandbytes,
)
from loram_cli.modeling.quiet import quiet_libraries
from loram_cli.reporting import Reporter
from loram_cli.runs.processes import is_main_process, process_count

# FSDP makes parameters of its slices, which torch allows for floating point types alone.
_NF4_STORAGE = torch.bfloat16


@dataclass(frozen=True)
class _Slot:
    """Where a checkpoint's tensor goes; a tied one goes to two places."""

    tensor: str
    places: tuple[tuple[Any, str], ...]
    shape: torch.Size
    quantized: bool


class SharedModel:
    """A model in two steps: first its modules, for LoRA to be attached to, then its weights.

    Args:
        model_dir: Directory with ``config.json`` and safetensors; widths may differ per layer.
        dtype: Of all weights that are not quantized, and of products with those that are.
        device: Of this process.
        attention: ``sdpa``, ``flash`` or ``eager``; None and ``auto`` leave it to transformers.
        nf4: Quantize the decoder linears, with double quantization.

    Attributes:
        model: The causal LM, frozen. Until :meth:`load`, weights have shapes and no storage.

    Raises:
        LoramError: Unknown family, or a library that is asked for is not installed.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: torch.dtype,
        device: str,
        attention: str | None = None,
        nf4: bool = False,
    ) -> None:
        import transformers

        self._family = family_for(read_config(model_dir), str(model_dir))
        self._index = CheckpointIndex.open(model_dir)
        self._dtype, self._device = dtype, device
        if nf4:
            require_bitsandbytes()
        settings: dict[str, Any] = {"dtype": dtype}
        if attention not in (None, "auto"):
            settings["attn_implementation"] = attention_kernel(attention)
        with quiet_libraries():
            config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True)
            # Global widths stay readable, as in load_causal_lm.
            config.allow_global_per_layer_attribute_access = True
            self.model = meta_causal_lm(self._family, config, device, **settings)
        self._untie_other_head()
        self._slots = self._take_places(nf4)
        if nf4:
            keep_standard_layout(self.model)
            # PEFT looks here before it chooses its 4-bit LoRA linear.
            self.model.is_loaded_in_4bit = True

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

        kind = torch.device(self._device).type
        mesh = init_device_mesh(kind, (process_count(),))
        with (
            TensorReader(self._index) as reader,
            reporter.progress("load", self._index.num_bytes / 2**20, "MiB") as progress,
        ):
            for part, prefix in [*self._parts(), (root, "")]:
                for name in [name for name in self._slots if name.startswith(prefix)]:
                    self._fill(self._slots.pop(name), reader)
                    progress.advance(self._index.tensors[name].num_bytes / 2**20)
                # The root stays whole from its forward pass to the end of the backward pass: the
                # head runs more or less often on each process, and gathers must match.
                fully_shard(part, mesh=mesh, reshard_after_forward=part is not root)
        if kind == "cpu":
            # gloo cannot average; this sums, and divides afterwards.
            for module in sharded_modules(root):
                module.set_force_sum_reduction_for_comms(True)

    def _parts(self) -> Iterator[tuple[Any, str]]:
        """What is gathered on its own: each decoder layer, and an embedding that is not tied."""
        for i, layer in enumerate(self.model.get_submodule(self._family.layers)):
            yield layer, self._family.layer_prefix(i)
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if embedding.weight is not head.weight:
            yield embedding, f"{self._family.embedding}."

    def _untie_other_head(self) -> None:
        """A head that is stored with values of its own is not tied, as in ``from_pretrained``."""
        names = [f"{part}.weight" for part in (self._family.embedding, self._family.lm_head)]
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if embedding.weight is not head.weight or names[1] not in self._index.tensors:
            return
        with TensorReader(self._index) as reader:
            pairs = zip(*(reader.read_chunks(name) for name in names), strict=True)
            if any(not torch.equal(mine, other) for (_, mine), (_, other) in pairs):
                head.weight = torch.nn.Parameter(head.weight.detach(), requires_grad=False)

    def _take_places(self, nf4: bool) -> dict[str, _Slot]:
        """Put stand-ins with a shape and no storage where weights go, on the right device."""
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        num_layers = len(self.model.get_submodule(self._family.layers))
        quantized = set(self._family.linear_names(num_layers)) if nf4 else set()
        for name in quantized:
            self._make_quantized(name.removesuffix(".weight"))
        names = {id(p): name for name, p in self.model.named_parameters()}
        places: dict[str, list[tuple[Any, str]]] = {}
        for module in self.model.modules():
            for kind, parameter in module.named_parameters(recurse=False):
                places.setdefault(names[id(parameter)], []).append((module, kind))
        for name, shape in shapes.items():
            if name in quantized:
                stand_in = _nf4_stand_in(self._device)
            else:
                nothing = torch.zeros((), dtype=self._dtype, device=self._device)
                stand_in = torch.nn.Parameter(nothing.expand(shape), requires_grad=False)
            for module, kind in places[name]:
                module._parameters[kind] = stand_in
        return {
            name: _Slot(name, tuple(places[name]), shape, name in quantized)
            for name, shape in shapes.items()
        }

    def _make_quantized(self, module_name: str) -> None:
        owner, _, attribute = module_name.rpartition(".")
        parent = self.model.get_submodule(owner)
        linear = nf4_linear(getattr(parent, attribute), self._dtype, _NF4_STORAGE)
        setattr(parent, attribute, linear.requires_grad_(False))

    def _fill(self, slot: _Slot, reader: TensorReader) -> None:
        entry = self._index.tensors.get(slot.tensor)
        if entry is None or entry.shape != tuple(slot.shape):
            found = "absent" if entry is None else f"of shape {list(entry.shape)}"
            raise LoramError(
                f"{self._index.directory}: tensor {slot.tensor} is {found}, "
                f"the model wants {list(slot.shape)}"
            )
        tensor = reader.read(slot.tensor).to(self._device, self._dtype)
        if slot.quantized:
            packed = nf4_weight(tensor, _NF4_STORAGE)
            linear = slot.places[0][0]
            # Block constants stay whole on every process: an eighth of a bit per weight.
            linear.quant_state = packed.quant_state
            tensor = packed.data.as_subclass(torch.Tensor)
        before = slot.places[0][0]._parameters[slot.places[0][1]]
        parameter = torch.nn.Parameter(tensor, requires_grad=before.requires_grad)
        for module, kind in slot.places:
            module._parameters[kind] = parameter


def _nf4_stand_in(device: str) -> Any:
    import bitsandbytes

    return bitsandbytes.nn.Params4bit(
        torch.zeros((1, 1), dtype=_NF4_STORAGE, device=device),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=_NF4_STORAGE,
        bnb_quantized=True,
    )


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

    Args:
        model: The causal LM.
        out: Directory to write into.
        dtype: Of the tensors in the file.
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
