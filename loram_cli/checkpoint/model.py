"""A model directory, opened once and handed on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loram_cli.arch.registry import family_for
from loram_cli.arch.spec import Family, Geometry
from loram_cli.arch.wrappers import Wrapper, wrapper_of
from loram_cli.checkpoint.config_values import check_float_weights
from loram_cli.checkpoint.header import DType
from loram_cli.checkpoint.identity import ModelIdentity, identify
from loram_cli.checkpoint.index import CheckpointIndex, read_config, read_json
from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.checkpoint.sources import require_tokenizer
from loram_cli.checkpoint.tokenizer_files import check_tokenizer
from loram_cli.errors import LoramError


@dataclass(frozen=True, eq=False)
class Model:
    """A model directory: its config and family, and on demand its tensors' headers.

    What is derived is computed at first use, and kept. No tensor is read, but for
    :attr:`identity`, and torch is not imported.

    Attributes:
        directory: With ``config.json``.
        config: The parsed ``config.json``.
        family: The model's family.
        wrapper: Where this is the text model of a multimodal one: the names there.
    """

    directory: Path
    config: Mapping[str, Any]
    family: Family
    wrapper: Wrapper | None = None

    @classmethod
    def open(cls, directory: Path) -> "Model":
        """Read the config and find the family; the weights are not opened yet.

        Raises:
            LoramError: The config is absent, not sound, of no known family, or of quantized
                weights.
        """
        config = read_config(directory)
        check_float_weights(config, str(directory / "config.json"))
        wrapper = wrapper_of(read_json(directory / "config.json"))
        family = family_for(config, str(directory))
        scale = family.logits_multiplier or family.logits_divisor
        if wrapper is not None and scale is not None:
            raise LoramError(
                f"{directory}: as a part of a {wrapper.model_type} model, transformers leaves out "
                f"{scale} of the {family.family} text model: it would be another model by itself",
                "save only the text model and pass that",
            )
        return cls(directory, config, family, wrapper)

    @classmethod
    def of(cls, model: "Path | Model") -> "Model":
        """The model itself, or the one in a directory; see :meth:`open`."""
        return model if isinstance(model, Model) else cls.open(model)

    @cached_property
    def index(self) -> CheckpointIndex:
        """Which tensor lies where.

        Raises:
            LoramError: See :meth:`.CheckpointIndex.open`.
        """
        return CheckpointIndex.open(self.directory)

    @cached_property
    def geometry(self) -> Geometry:
        """The widths that the config states or implies."""
        return self.family.geometry(self.config)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by name of every tensor that the model has: the config's, and so the weights'.

        Raises:
            LoramError: A tensor is missing, unknown, of another shape or of no real numbers.
        """
        expected = self.family.tensor_shapes(self.config)
        if self.stored_head_params:
            # Some tied checkpoints store the head as well: keep what is there.
            expected[f"{self.family.lm_head}.weight"] = expected[f"{self.family.embedding}.weight"]
        self.index.check_shapes(expected, self.family.is_ignored)
        return expected

    @cached_property
    def identity(self) -> ModelIdentity:
        """Digests that tell the model from another.

        Raises:
            LoramError: The directory is not a sound safetensors checkpoint.
        """
        return identify(self.index, self.config)

    @cached_property
    def low_bit(self) -> LowBit | None:
        """How the decoder linears are rounded; None where they are whole."""
        return LowBit.of_config(self.config, str(self.directory / "config.json"))

    @property
    def tied_embeddings(self) -> bool:
        """Whether the config says that the head is the embedding."""
        return self.geometry.tied_embeddings

    @property
    def stored_head_params(self) -> int:
        """Parameters of a head that the weights hold beside a tied embedding; else 0."""
        head = self.index.tensors.get(f"{self.family.lm_head}.weight")
        return math.prod(head.shape) if self.tied_embeddings and head is not None else 0

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.geometry.layers)

    @property
    def dtype(self) -> DType:
        """The type that the embedding is stored in, which stands for the model's."""
        return self.index.tensors[f"{self.family.embedding}.weight"].dtype

    @property
    def num_params(self) -> int:
        """Elements of all stored tensors together."""
        return self.index.num_params

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors together."""
        return self.index.num_bytes

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Names of every decoder linear's weight, in the order of the layers."""
        return tuple(self.family.linear_names(self.config))

    def check_whole(self, *, tokenizer: bool = True) -> None:
        """Check that all of a model is there: headers, every shape, and the tokenizer.

        Args:
            tokenizer: Whether it needs one; one that is there must fit in any case.

        Raises:
            LoramError: Something is missing, or does not fit.
        """
        if tokenizer:
            require_tokenizer(self.directory)
        check_tokenizer(self.directory, self.geometry.vocab_size)
        _ = self.shapes
