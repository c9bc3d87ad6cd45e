"""A causal LM of which one decoder layer at a time is in memory.

The Hugging Face model is built on torch's meta device, without storage. Its own forward decides
what goes into each layer (masks, rotary embeddings, scaled embeddings) and what comes after the
last one (final norm, head, capped logits): the layers inside it only record how they are called.
A layer is then run, by the family's own layer class, with weights read from the checkpoint for as
long as it is needed. Nothing here knows a family.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.modeling.layerwise.raised import RaisedWeight
from loram_cli.modeling.layerwise.states import computed_dtype
from loram_cli.modeling.load import loading, settle_calls, usable_device
from loram_cli.modeling.meta_model import fill_stored_buffers, meta_causal_lm, native_config
from loram_cli.quiet import quiet_libraries


class DecoderLayer:
    """One decoder layer with its weights; call it on hidden states.

    Attributes:
        module: The family's layer module; its parameters want no gradient unless told to.
        prefix: Of its tensors' names, such as ``model.layers.3.``.
    """

    def __init__(self, module: Any, prefix: str, calls: dict[tuple[int, int], Any]) -> None:
        self.module = module
        self.prefix = prefix
        self._calls = calls

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the layer, shape (windows, length, hidden) like before it."""
        windows, length, _ = hidden.shape
        args, kwargs = self._calls[windows, length]
        # The class's forward: the instance's own is the one that records.
        out = type(self.module).forward(self.module, hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def present(self, modules: Iterable[str]) -> list[str]:
        """Those of a family's modules that a layer of this kind has, in order."""
        found = {name for name, _ in self.module.named_modules()}
        return [name for name in modules if name in found]


class LayerStream:
    """Runs a checkpoint part by part. Use as a context manager.

    Args:
        model: A model, or its directory.
        device: ``cpu``, ``cuda``, ...; None takes a GPU when there is one.

    Attributes:
        family: The model's family.
        num_layers: Decoder layers.
        dtype: The type that parts are run in.
        device: Where parts are run.
    """

    def __init__(self, model: Path | Model, device: str | None = None) -> None:
        self._source = Model.of(model)
        self.family = self._source.family
        self.device = usable_device(device)
        self._reader = TensorReader(self._source.index)
        stored = self._source.dtype.to_torch()
        self.dtype = computed_dtype(stored, self.device)
        experts = self.family.experts
        narrower = stored.itemsize < self.dtype.itemsize
        self._kept_as_stored = experts.parameters if experts and narrower else ()
        # One expert after the other, where each is raised as it is taken.
        how = {"experts_implementation": "eager"} if self._kept_as_stored else {}
        file = self._source.directory / "config.json"
        with loading(file), quiet_libraries():
            config = native_config(self._source.config, self.dtype)
            settle_calls(config, str(file))
            self._model = meta_causal_lm(self.family, config, self.device, **how)
        self._layers = self._model.get_submodule(self.family.layers)
        self.num_layers = self._source.num_layers
        self.hidden_size = self._source.geometry.hidden_size
        self.vocab_size = self._source.geometry.vocab_size
        self._calls: list[dict[tuple[int, int], Any]] = [{} for _ in self._layers]
        self._stem_out: torch.Tensor | None = None
        self._head_in: torch.Tensor | None = None
        for i, layer in enumerate(self._layers):
            layer.forward = partial(self._record, i)
        self._load_small_parts()

    def __enter__(self) -> "LayerStream":
        return self

    def __exit__(self, *error: Any) -> None:
        self._reader.__exit__(*error)

    @torch.no_grad()
    def embed(self, ids: torch.Tensor, batch: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Hidden states before the first layer, ``batch`` windows at a time.

        Only the embedding rows that occur are read. Must be used up before a layer is run, since
        it also finds out how each layer is called.

        Args:
            ids: Token ids, shape (samples, length).
            batch: Windows per forward pass; layers are to be called with the same.

        Yields:
            The first window's index and hidden states of shape (windows, length, hidden).
        """
        used, places = ids.unique(return_inverse=True)
        name = f"{self.family.embedding}.weight"
        chunks = self._reader.read_chunks(name, used.tolist())
        rows = torch.cat([chunk for _, chunk in chunks]).to(self.device, self.dtype)
        embedding = self._model.get_submodule(self.family.embedding)
        stack = self._model.get_submodule(self.family.layers.rpartition(".")[0])
        padding_idx, embedding.padding_idx = embedding.padding_idx, None
        try:
            with _parameters_set(embedding, {"weight": rows}):
                for start in range(0, len(ids), batch):
                    stack(input_ids=places[start : start + batch].to(self.device), use_cache=False)
                    assert self._stem_out is not None
                    yield start, self._stem_out
        finally:
            self._stem_out = None
            embedding.padding_idx = padding_idx

    @contextmanager
    def layer(self, index: int) -> Iterator[DecoderLayer]:
        """A decoder layer with its weights, for the length of the ``with`` block."""
        module = self._layers[index]
        prefix = self.family.layer_prefix(index)
        weights = {
            name: self._read(prefix + name, parameter.shape, raised=name in self._kept_as_stored)
            for name, parameter in module.named_parameters()
        }
        fill_stored_buffers(module, prefix, self._source.index, self._reader, self.device)
        with _parameters_set(module, weights):
            yield DecoderLayer(module, prefix, self._calls[index])

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """What follows the last layer: final norm and output head.

        Yields:
            Logits, shape (1, tokens, vocab_size), of hidden states of shape (1, tokens, hidden).
        """
        module = self._model.get_submodule(self.family.lm_head)
        # A tied head has the embedding's weight, and a bias of its own; one that is stored beside
        # a tied embedding counts, as in ``from_pretrained``.
        is_shared = self._source.tied_embeddings and not self._source.stored_head_params
        tied = {"weight": self.family.embedding} if is_shared else {}
        weights = {
            name: self._read(f"{tied.get(name, self.family.lm_head)}.{name}", parameter.shape)
            for name, parameter in module.named_parameters()
        }

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            self._head_in = hidden
            try:
                # The embeddings passed are ignored: the last layer gives ``_head_in``.
                return self._model(inputs_embeds=hidden.detach(), use_cache=False).logits
            finally:
                self._head_in = None

        with _parameters_set(module, weights):
            yield logits

    def _record(self, index: int, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self._head_in is not None:
            return self._returned(self._head_in)
        if index == 0:
            self._stem_out = hidden_states
        self._calls[index][tuple(hidden_states.shape[:2])] = (args, kwargs)
        return self._returned(hidden_states)

    def _returned(self, hidden: torch.Tensor) -> Any:
        """Hidden states in the form in which the layer class returns them."""
        return (hidden, None) if self.family.tuple_output else hidden

    def _load_small_parts(self) -> None:
        """Final norms and whatever else is neither layer, embedding nor head: kept throughout."""
        parts = (self.family.layers, self.family.embedding, self.family.lm_head)
        small = {
            name: self._read(name, parameter.shape)
            for name, parameter in self._model.named_parameters()
            if not name.startswith(tuple(f"{part}." for part in parts))
        }
        _set_parameters(self._model, small)

    def _read(self, name: str, shape: torch.Size, *, raised: bool = False) -> torch.Tensor:
        self._source.index.entry_of(name, shape)
        if raised:
            return RaisedWeight(self._reader.read(name).to(self.device), self.dtype)
        return self._reader.read(name).to(self.device, self.dtype)


@contextmanager
def _parameters_set(module: Any, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Parameters by name for the length of the block; the storage goes when it ends."""
    before = {name: module.get_parameter(name) for name in tensors}
    _set_parameters(module, tensors)
    tensors.clear()
    try:
        yield
    finally:
        _set_parameters(module, before)


def _set_parameters(module: Any, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        owner, _, kind = name.rpartition(".")
        parameter = (
            tensor
            if isinstance(tensor, torch.nn.Parameter)
            else torch.nn.Parameter(tensor, requires_grad=False)
        )
        module.get_submodule(owner)._parameters[kind] = parameter
