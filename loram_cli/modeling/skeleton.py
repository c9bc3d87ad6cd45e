"""A causal LM whose modules stand before its weights do.

Every weight is a stand-in at first: of its shape, type and device, and without storage. LoRA can
be attached to it, and parts can then be filled one by one, or for a while only, so that nobody
ever holds a model that exceeds the memory.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loram_cli.checkpoint.low_bit import PackedEntry
from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.memory.account import nf4_tensor_bytes
from loram_cli.modeling.load import attention_kernel, load_config, load_generation_config, loading
from loram_cli.modeling.low_bit_linear import LowBitLinear
from loram_cli.modeling.meta_model import fill_stored_buffers, meta_causal_lm
from loram_cli.modeling.quantize import (
    keep_standard_layout,
    nf4_linear,
    nf4_weight,
    quantize_experts,
    require_bitsandbytes,
)
from loram_cli.quiet import quiet_libraries
from loram_cli.reporting import Reporter
from loram_cli.units import MIB


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint's tensor goes; a tied one goes to two places.

    Attributes:
        tensor: Its name in the checkpoint.
        places: Modules and the parameter's name in each.
        shape: Of the tensor.
        quantized: Whether it is held in NF4.
        packed: Whether it is held as rows of few bits, as it is stored.
        experts: How many routed experts lie along its first axis, if its layer can run with only
            those there that tokens reach; else 0.
        stand_in: What is there while the weight is not.
        num_bytes: What the weight takes.
    """

    tensor: str
    places: tuple[tuple[Any, str], ...]
    shape: torch.Size
    quantized: bool
    stand_in: torch.nn.Parameter
    num_bytes: int
    packed: bool = False
    experts: int = 0


@dataclass(frozen=True)
class Weight:
    """A tensor in the form that the model wants; ``quant_state`` is bitsandbytes' for NF4."""

    data: torch.Tensor
    quant_state: Any = None


class SkeletonModel:
    """The modules of a checkpoint's model, and the way of its weights into them.

    Args:
        model: A model, or its directory; widths may differ per layer.
        dtype: Of all weights that are not quantized, and of products with those that are.
        device: Where the weights will be.
        attention: ``sdpa``, ``flash`` or ``eager``; None and ``auto`` leave it to transformers.
        nf4: Quantize the decoder linears, with double quantization. Those of few bits stay as they
            are stored.

    Attributes:
        model: The causal LM, frozen.
        index: The checkpoint's tensors.
        dtype: As asked for.
        device: As asked for.
        nf4: Whether decoder linears are held in NF4.
        slots: By tensor name, what is to be filled.
        experts: What the family's experts are; None where it has none.
        top_k: How many of its layer's experts a token has at most.
        nf4_storage: The type that packed weights are held as; the bits are the same in any.

    Raises:
        LoramError: Unknown family, or a library that is asked for is not installed.
    """

    nf4_storage: torch.dtype = torch.uint8

    def __init__(
        self,
        model: Path | Model,
        *,
        dtype: torch.dtype,
        device: str,
        attention: str | None = None,
        nf4: bool = False,
    ) -> None:
        source = Model.of(model)
        directory = source.directory
        self._family, self.index = source.family, source.index
        self.experts = source.family.experts
        self.top_k = max(layer.top_k for layer in source.geometry.layers)
        self.dtype, self.device = dtype, device
        if nf4:
            require_bitsandbytes()
        settings: dict[str, Any] = {"dtype": dtype}
        if attention not in (None, "auto"):
            settings["attn_implementation"] = attention_kernel(attention)
        config = load_config(directory)
        with loading(directory / "config.json"), quiet_libraries():
            self.model = meta_causal_lm(self._family, config, device, **settings)
        self.model.wrapper = source.wrapper
        generation = load_generation_config(directory)
        if generation is not None:
            self.model.generation_config = generation
        self._untie_other_head()
        with TensorReader(self.index) as reader:
            fill_stored_buffers(self.model, "", self.index, reader, self.device)
        self._low_bit = source.low_bit
        self.nf4 = nf4 and self._low_bit is None
        self.slots = self._take_places(
            set(source.linear_names) if self.nf4 else set(),
            set(source.linear_names) if self._low_bit else set(),
        )
        if self.nf4:
            keep_standard_layout(self.model)
            # PEFT looks here before it chooses its 4-bit LoRA linear.
            self.model.is_loaded_in_4bit = True

    def layers(self) -> Iterator[tuple[Any, list[Slot]]]:
        """Each decoder layer, and what it is filled with, experts last."""
        for i, layer in enumerate(self.model.get_submodule(self._family.layers)):
            slots = self._slots_under(self._family.layer_prefix(i))
            yield layer, sorted(slots, key=lambda slot: slot.experts)

    def untied_embedding(self) -> tuple[Any, list[Slot]] | None:
        """An embedding that is not the head as well, and what it is filled with."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if embedding.weight is head.weight:
            return None
        return embedding, self._slots_under(f"{self._family.embedding}.")

    def read(self, slot: Slot, reader: TensorReader) -> Weight:
        """A weight from the checkpoint, quantized where that is its form, on the device.

        Raises:
            LoramError: The tensor is absent or of another shape.
        """
        self.index.entry_of(slot.tensor, slot.shape)
        if slot.packed:
            return Weight(reader.read_packed(slot.tensor).to(self.device))
        tensor = torch.empty(slot.shape, dtype=self.dtype, device=self.device)
        # Piece by piece: what is stored is never whole beside what is held.
        for done, rows in reader.read_chunks(slot.tensor):
            tensor[done : done + len(rows)] = rows
        if not slot.quantized:
            return Weight(tensor)
        packed = nf4_weight(tensor, self.nf4_storage)
        return Weight(packed.data.as_subclass(torch.Tensor), packed.quant_state)

    def unread(self, slot: Slot, device: str | None = None) -> Weight:
        """Memory for the weights of experts, with anything in it.

        Args:
            slot: Whose weights.
            device: Where; None for the model's.
        """
        return Weight(torch.empty(slot.shape, dtype=self.dtype, device=device or self.device))

    def read_experts(
        self, slot: Slot, reader: TensorReader, wanted: Sequence[int], into: torch.Tensor
    ) -> None:
        """Some experts' weights from the checkpoint, as :meth:`read` gives them.

        Args:
            slot: Whose weights.
            reader: Of the checkpoint.
            wanted: Rising indices of the experts.
            into: Filled there; of the slot's shape.

        Raises:
            LoramError: The tensor is absent or of another shape.
        """
        self.index.entry_of(slot.tensor, slot.shape)
        for done, rows in reader.read_chunks(slot.tensor, wanted):
            for place, row in zip(wanted[done : done + len(rows)], rows, strict=True):
                into[place] = row

    def _slots_under(self, prefix: str) -> list[Slot]:
        return [slot for name, slot in self.slots.items() if name.startswith(prefix)]

    def _untie_other_head(self) -> None:
        """A head that is stored with values of its own is not tied, as in ``from_pretrained``."""
        names = [f"{part}.weight" for part in (self._family.embedding, self._family.lm_head)]
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if embedding.weight is not head.weight or names[1] not in self.index.tensors:
            return
        with TensorReader(self.index) as reader:
            pairs = zip(*(reader.read_chunks(name) for name in names), strict=True)
            if any(not torch.equal(mine, other) for (_, mine), (_, other) in pairs):
                head.weight = torch.nn.Parameter(head.weight.detach(), requires_grad=False)

    def _take_places(self, quantized: set[str], packed: set[str]) -> dict[str, Slot]:
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        for name in quantized:
            self._replace(name, self._nf4_linear)
        for name in packed:
            self._replace(name, self._low_bit_linear)
        names = {id(p): name for name, p in self.model.named_parameters()}
        places: dict[str, list[tuple[Any, str]]] = {}
        for module in self.model.modules():
            for kind, parameter in module.named_parameters(recurse=False):
                places.setdefault(names[id(parameter)], []).append((module, kind))
        slots = {}
        for name, shape in shapes.items():
            if name in quantized:
                stand_in = self._nf4_stand_in()
                num_bytes = nf4_tensor_bytes(shape.numel())
            elif name in packed:
                none = torch.zeros((), dtype=torch.uint8, device=self.device)
                entry = self.index.entry_of(name, shape)
                assert isinstance(entry, PackedEntry)
                stand_in = torch.nn.Parameter(none.expand(entry.stored.shape), requires_grad=False)
                num_bytes = entry.num_bytes
            else:
                nothing = torch.zeros((), dtype=self.dtype, device=self.device)
                stand_in = torch.nn.Parameter(nothing.expand(shape), requires_grad=False)
                num_bytes = shape.numel() * self.dtype.itemsize
            slot = Slot(
                name, tuple(places[name]), shape, name in quantized, stand_in, num_bytes,
                name in packed, self._experts_in(name, shape),
            )  # fmt: skip
            for module, kind in slot.places:
                module._parameters[kind] = stand_in
            slots[name] = slot
        return slots

    def _experts_in(self, name: str, shape: torch.Size) -> int:
        parameters = self.experts.parameters if self.experts is not None else ()
        return shape[0] if self._family.split_layer(name)[1] in parameters else 0

    def _replace(self, weight_name: str, made_of: Callable[[Any], Any]) -> None:
        owner, _, attribute = weight_name.removesuffix(".weight").rpartition(".")
        parent = self.model.get_submodule(owner)
        setattr(parent, attribute, made_of(getattr(parent, attribute)).requires_grad_(False))

    def _nf4_linear(self, plain: Any) -> Any:
        return nf4_linear(plain, self.dtype, self.nf4_storage)

    def _low_bit_linear(self, plain: Any) -> Any:
        assert self._low_bit is not None
        return LowBitLinear(plain, self._low_bit, self.dtype)

    def _nf4_stand_in(self) -> Any:
        import bitsandbytes

        return bitsandbytes.nn.Params4bit(
            torch.zeros((1, 1), dtype=self.nf4_storage, device=self.device),
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=self.nf4_storage,
            bnb_quantized=True,
        )


def fill_whole(skeleton: SkeletonModel, reporter: Reporter) -> None:
    """Fill a model that fits the memory, in the form that it was asked for.

    Layer by layer, so that no more than one layer's experts are ever there in full where they are
    held in NF4.

    Args:
        skeleton: Not filled yet; of no more use afterwards but for its model. LoRA is attached
            before: PEFT tells 4-bit linears by their stand-ins.
        reporter: Told of progress.

    Raises:
        LoramError: A tensor is absent or of another shape.
    """
    total = sum(slot.num_bytes for slot in skeleton.slots.values())
    with (
        TensorReader(skeleton.index, once=True) as reader,
        reporter.progress("load", total / MIB, "MiB") as progress,
    ):

        def fill_these(slots: Iterable[Slot]) -> None:
            for slot in slots:
                fill(slot, skeleton.read(slot, reader))
                progress.advance(slot.num_bytes / MIB)

        done = set()
        for layer, slots in skeleton.layers():
            fill_these(slots)
            done |= {slot.tensor for slot in slots}
            if skeleton.nf4 and skeleton.experts is not None:
                quantize_experts(layer, skeleton.experts)
        fill_these(slot for name, slot in skeleton.slots.items() if name not in done)


def fill(slot: Slot, weight: Weight) -> None:
    """Put a weight where its stand-in is."""
    module, kind = slot.places[0]
    if weight.quant_state is not None:
        module.quant_state = weight.quant_state
    parameter = torch.nn.Parameter(
        weight.data, requires_grad=module._parameters[kind].requires_grad
    )
    for module, kind in slot.places:
        module._parameters[kind] = parameter


def drain(slot: Slot) -> None:
    """Put the stand-in back; the weight's storage goes with its last user."""
    for module, kind in slot.places:
        module._parameters[kind] = slot.stand_in
        if slot.quantized:
            module.quant_state = None
