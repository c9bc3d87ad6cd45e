"""What a decoder family's tensors are: names, coupled axes and shapes, read from data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

Axis = Literal["query", "key_value", "intermediate"]
"""What one axis of a weight runs over; ``None`` in its place means that it is never pruned."""


@dataclass(frozen=True)
class LinearModule:
    """One linear module of a decoder layer; its weight has shape (rows, columns) = (out, in).

    Attributes:
        name: Name inside the layer, such as ``self_attn.q_proj``.
        rows: Segments along the output axis, in order; empty when it is the hidden width.
            Fused projections have several segments.
        columns: Segments along the input axis; empty when it is the hidden width.
        bias: Whether a bias exists, or the config key that says so.
    """

    name: str
    rows: tuple[Axis, ...] = ()
    columns: tuple[Axis, ...] = ()
    bias: bool | str = False


@dataclass(frozen=True)
class LayerGeometry:
    """Widths of one decoder layer."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int

    def axis_units(self, axis: Axis) -> int:
        """How many indices an axis has: heads times head_dim, or MLP channels."""
        if axis == "query":
            return self.num_attention_heads * self.head_dim
        if axis == "key_value":
            return self.num_key_value_heads * self.head_dim
        return self.intermediate_size


@dataclass(frozen=True)
class Geometry:
    """Widths of a whole model, layer by layer, as its ``config.json`` states them."""

    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    layers: tuple[LayerGeometry, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Geometry":
        """Read a Hugging Face config, with or without ``per_layer_config``.

        Args:
            config: The parsed ``config.json``, with the family's defaults where it leaves
                something open: see :meth:`Family.geometry`.

        Raises:
            KeyError: A required width is absent.
        """
        heads = config["num_attention_heads"]
        base = LayerGeometry(
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate_size=config["intermediate_size"],
        )
        overrides = {int(i): widths for i, widths in (config.get("per_layer_config") or {}).items()}
        fields = LayerGeometry.__dataclass_fields__
        return cls(
            hidden_size=config["hidden_size"],
            vocab_size=config["vocab_size"],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            layers=tuple(
                replace(base, **{k: v for k, v in overrides.get(i, {}).items() if k in fields})
                for i in range(config["num_hidden_layers"])
            ),
        )


@dataclass(frozen=True)
class GgufFacts:
    """What llama.cpp's converter does to a family's tensors.

    Source: ``convert_hf_to_gguf.py`` of llama.cpp. Tensor names come from the gguf package.

    Attributes:
        architecture: The value of ``general.architecture``.
        rotary_permuted: Modules whose rows are reordered head by head, since llama.cpp rotates
            neighbouring rows where transformers rotates the halves of a head.
    """

    architecture: str
    rotary_permuted: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Family:
    """A decoder family: which tensor is what.

    Attributes:
        family: Its name, and its file's.
        model_types: The ``model_type`` values of its configs.
        architecture: The causal LM class in transformers.
        decoder_layer: Full name of the decoder layer's class.
        layers: Full name of the module list of decoder layers.
        embedding: Full name of the input embedding.
        lm_head: Full name of the output head.
        norms: Norm weights outside the layers.
        modules: The linear modules of a decoder layer.
        layer_norms: Norm weights of a decoder layer, and whether they run over the hidden width
            or over one head.
        ignored: Derived buffers that old checkpoints hold.
        config_defaults: What a key means that ``config.json`` leaves out, where that is neither
            false nor derived from another key: files written by older tools lack such keys.
        gguf: How the family's GGUF files differ; None where llama.cpp does not know it.
    """

    family: str
    model_types: tuple[str, ...]
    architecture: str
    decoder_layer: str
    layers: str
    embedding: str
    lm_head: str
    norms: tuple[str, ...]
    modules: tuple[LinearModule, ...]
    layer_norms: Mapping[str, Literal["hidden", "head"]]
    ignored: tuple[str, ...]
    config_defaults: Mapping[str, Any] = field(default_factory=dict)
    gguf: GgufFacts | None = None

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Family":
        """Build a family from one parsed file of ``families/``."""
        modules = tuple(
            LinearModule(
                name=module["name"],
                rows=tuple(module.get("rows", ())),
                columns=tuple(module.get("columns", ())),
                bias=module.get("bias", False),
            )
            for module in data["modules"]
        )
        plain = {key: tuple(data[key]) for key in ("model_types", "norms", "ignored")}
        gguf = data.get("gguf")
        if gguf is not None:
            permuted = tuple(gguf.get("rotary_permuted", ()))
            gguf = GgufFacts(**{**gguf, "rotary_permuted": permuted})
        return cls(**{**data, **plain, "modules": modules, "gguf": gguf})

    @cached_property
    def lora_targets(self) -> tuple[str, ...]:
        """Last name parts of every decoder linear, as PEFT's ``target_modules`` wants them."""
        return tuple(module.name.rsplit(".", 1)[-1] for module in self.modules)

    @cached_property
    def lm_head_target(self) -> str:
        """The output head's name as a PEFT target."""
        return self.lm_head.rsplit(".", 1)[-1]

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """The widths that a config of this family states or implies.

        Args:
            config: The parsed ``config.json``, with or without ``per_layer_config``.

        Raises:
            KeyError: A required width is absent.
        """
        return Geometry.from_config({**self.config_defaults, **config})

    def layer_prefix(self, layer: int) -> str:
        """Prefix of a layer's tensors, such as ``model.layers.3.``."""
        return f"{self.layers}.{layer}."

    def module_named(self, name: str) -> tuple[int, LinearModule] | None:
        """The layer index and module behind a full module name, or None if there is none.

        Args:
            name: Such as ``model.layers.3.self_attn.q_proj`` (no ``.weight``).
        """
        prefix = f"{self.layers}."
        if not name.startswith(prefix):
            return None
        index, _, rest = name[len(prefix) :].partition(".")
        for module in self.modules:
            if index.isdigit() and rest == module.name:
                return int(index), module
        return None

    def is_ignored(self, name: str) -> bool:
        """Whether a checkpoint tensor is a derived buffer that is safe to leave out."""
        return any(name.endswith(f".{suffix}") for suffix in self.ignored)

    def tensor_shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Every tensor that a checkpoint with this config must hold, with its shape.

        Tied heads are left out, since the file has the embedding alone.
        """
        geometry = self.geometry(config)
        hidden = geometry.hidden_size
        shapes = {f"{self.embedding}.weight": (geometry.vocab_size, hidden)}
        for i, layer in enumerate(geometry.layers):
            shapes.update(self.layer_shapes(i, layer, config))
        shapes.update(dict.fromkeys(self.norms, (hidden,)))
        if not geometry.tied_embeddings:
            shapes[f"{self.lm_head}.weight"] = (geometry.vocab_size, hidden)
        return shapes

    def linear_names(self, num_hidden_layers: int) -> Iterator[str]:
        """Full names of every decoder linear's weight."""
        for i in range(num_hidden_layers):
            for module in self.modules:
                yield f"{self.layer_prefix(i)}{module.name}.weight"

    def layer_shapes(
        self, index: int, layer: LayerGeometry, config: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        """Every tensor of one decoder layer with its shape.

        Args:
            index: The layer's place, for the names.
            layer: Its widths.
            config: The parsed ``config.json``.
        """
        hidden = config["hidden_size"]
        prefix = self.layer_prefix(index)
        shapes: dict[str, tuple[int, ...]] = {}
        for module in self.modules:
            rows = sum(layer.axis_units(axis) for axis in module.rows) or hidden
            columns = sum(layer.axis_units(axis) for axis in module.columns) or hidden
            shapes[f"{prefix}{module.name}.weight"] = (rows, columns)
            has_bias = (
                config.get(module.bias, False) if isinstance(module.bias, str) else module.bias
            )
            if has_bias:
                shapes[f"{prefix}{module.name}.bias"] = (rows,)
        for name, width in self.layer_norms.items():
            shapes[f"{prefix}{name}"] = (hidden if width == "hidden" else layer.head_dim,)
        return shapes
