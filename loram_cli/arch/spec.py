"""What a decoder family's tensors are: names, coupled axes and shapes, read from data.

A family is one file in ``families/``. Its keys are the attributes of :class:`Family`; a module's
are those of :class:`LinearModule`, a norm's those of :class:`LayerTensor`. What runs over what is
said in *widths*:

=====================  ===========================================================================
``hidden``             the residual stream; what an empty list of a module's rows means
``query``              query heads times the width of a head
``key_value``          key/value heads times the width of a head
``query_heads``        one entry a query head (attention sinks, gates)
``key_value_heads``    one entry a key/value head
``head``               the width of one head
``intermediate``       MLP channels
``experts``            one entry an expert
``2*a*b+c``            numbers and config keys, multiplied and added: an axis that stays whole
=====================  ===========================================================================
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal

from loram_cli.arch.experts import AdaptedWeight, Experts
from loram_cli.errors import LoramError
from loram_cli.units import whole_number

Axis = str
"""What one axis of a weight runs over: a pruned width, or a product that is never pruned."""

ATTENTION_AXES = frozenset({"query", "key_value", "query_heads", "key_value_heads"})
"""Axes that are cut with the key/value heads."""

PRUNED_AXES = ATTENTION_AXES | {"intermediate", "experts"}
"""Axes that pruning cuts."""

Condition = Mapping[str, Any]
"""Config keys and the values that they must all have."""


@dataclass(frozen=True)
class LinearModule:
    """One linear module of a decoder layer; its weight has shape (rows, columns) = (out, in).

    Attributes:
        name: Name inside the layer, such as ``self_attn.q_proj``.
        rows: Segments along the output axis, in order; empty when it is the hidden width.
            Fused projections have several segments.
        columns: Segments along the input axis; empty when it is the hidden width.
        bias: Whether a bias exists, or the config key that says so.
        interleaved: Whether the segments of ``rows`` alternate from one key/value head to the
            next (``q0 k0 v0 q1 k1 v1``), in place of one after the other.
        kinds: The kinds of layer that have it; empty when all have.
        lora: Whether it can have LoRA factors: fused kernels read some weights past their module.
        when: What the config must say for it to exist; empty: it always does.
    """

    name: str
    rows: tuple[Axis, ...] = ()
    columns: tuple[Axis, ...] = ()
    bias: bool | str = False
    interleaved: bool = False
    kinds: tuple[str, ...] = ()
    lora: bool = True
    when: Condition = field(default_factory=dict)


@dataclass(frozen=True)
class LayerTensor:
    """A norm's weight or bias, or another tensor of a layer that is no linear's.

    Attributes:
        name: Full name inside the layer, such as ``self_attn.q_norm.weight``.
        shape: Width of every axis; only the first is ever cut, and the second where it runs over
            experts. A scalar has none.
        when: What the config must say for it to exist; empty: it always does.
        kinds: The kinds of layer that have it; empty when all have.
    """

    name: str
    shape: tuple[Axis | int, ...]
    when: Condition = field(default_factory=dict)
    kinds: tuple[str, ...] = ()

    @classmethod
    def from_data(cls, name: str, data: Any) -> "LayerTensor":
        """From a width, a list of widths, or an object with ``shape`` and the other keys."""
        data = data if isinstance(data, Mapping) else {"shape": data}
        shape = data["shape"] if isinstance(data["shape"], list) else [data["shape"]]
        return cls(name, tuple(shape), data.get("when", {}), tuple(data.get("kinds", ())))


@dataclass(frozen=True)
class LayerKinds:
    """How a config says of which kind each layer is.

    Attributes:
        keys: Config keys that list the layers' kinds, or spell them, one letter a layer; the first
            that is there counts.
        names: Other names and letters of kinds.
        every: The config key of a period, where the others are absent: each such layer is of kind
            ``then``, the others of kind ``otherwise``.
        then: See ``every``.
        otherwise: See ``every``.
        first: The config key of the first layer that may be of kind ``then``.
        last: The config key of the last one; absent or negative for the last layer.
        but: The config key that lists layers of kind ``otherwise``.
    """

    keys: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    every: str | None = None
    then: str = ""
    otherwise: str = ""
    first: str | None = None
    last: str | None = None
    but: str | None = None

    def of(self, config: Mapping[str, Any]) -> list[str]:
        """The kind of every layer.

        Raises:
            KeyError: The config does not say.
        """
        for key in self.keys:
            if config.get(key) is not None:
                return [self.names.get(kind, kind) for kind in config[key]]
        count = config["num_hidden_layers"]
        if self.first is None and self.every is None and config.get(self.but or "") is None:
            raise KeyError(self.keys[0])
        period = config[self.every] if self.every else 1
        first = config[self.first] if self.first else 0
        last = config.get(self.last or "")
        last = count - 1 if last is None or last < 0 else last
        others = config.get(self.but or "") or ()
        return [
            self.otherwise
            if (i + 1) % period or not first <= i <= last or i in others
            else self.then
            for i in range(count)
        ]


@dataclass(frozen=True)
class LayerGeometry:
    """Widths of one decoder layer.

    Attributes:
        num_attention_heads: Query heads.
        num_key_value_heads: Key/value heads; each has as many query heads.
        head_dim: Width of a head.
        intermediate_size: MLP channels.
        kind: Of the layer, where a family has several kinds.
        has_attention: Whether the layer has heads that can be pruned.
        has_mlp: Whether the layer has channels that can be pruned.
        num_experts: Experts that a router picks among; 0 in a family without.
        has_experts: Whether the layer has them.
        top_k: How many of them a token has.
        expert_groups: Groups of equal size that the router picks among first.
        groups_chosen: How many of the groups a token may use.
        fixed: Products of config keys that its tensors run over, with their value.
        ranks: Ranks of the linear modules that are held as two factors, by name.
        absent: Names of the linear modules that the config leaves out.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    kind: str = ""
    has_attention: bool = True
    has_mlp: bool = True
    num_experts: int = 0
    has_experts: bool = False
    top_k: int = 0
    expert_groups: int = 1
    groups_chosen: int = 1
    fixed: tuple[tuple[str, int], ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def queries_per_key_value(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def axis_units(self, axis: Axis) -> int:
        """How many indices an axis has: heads times head_dim, heads, MLP channels, or a product.

        Raises:
            KeyError: No family of this layer has such an axis.
        """
        units = {
            "query": self.num_attention_heads * self.head_dim,
            "key_value": self.num_key_value_heads * self.head_dim,
            "query_heads": self.num_attention_heads,
            "key_value_heads": self.num_key_value_heads,
            "head": self.head_dim,
            "intermediate": self.intermediate_size,
            "experts": self.num_experts,
        }
        return units[axis] if axis in units else dict(self.fixed)[axis]

    def tensor_shape(self, tensor: LayerTensor, hidden: int) -> tuple[int, ...]:
        """The shape of one of the layer's tensors that are no linear's.

        Args:
            tensor: As the family's file has it.
            hidden: The residual stream's width.
        """
        return tuple(
            a if isinstance(a, int) else hidden if a == "hidden" else self.axis_units(a)
            for a in tensor.shape
        )


LOW_RANK = "low_rank"
"""The config's key of ranks by layer index and module name, where linears are two factors."""

FACTORS = ("first", "second")
"""Names of the two: of shape (rank, columns) and (rows, rank)."""

WIDTHS = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
"""The widths of a layer that ``per_layer_config`` may state."""

EXPERT_WIDTHS = ("num_experts", "top_k")
"""Those that it may state beside them, in a family with experts."""

# A layer class that derives a head's width from the head count would take the pruned count for the
# base's: such a config keeps its own keys as they were, and the kept counts stand beside them.
_KEPT_KEYS: dict[str, str | None] = {
    "num_attention_heads": "kept_attention_heads",
    "num_key_value_heads": "kept_key_value_heads",
    "intermediate_size": "kept_intermediate_size",
    "head_dim": None,
}


@dataclass(frozen=True)
class Geometry:
    """Widths of a whole model, layer by layer, as its ``config.json`` states them.

    Attributes:
        hidden_size: Width of the residual stream.
        vocab_size: Tokens.
        tied_embeddings: Whether the head is the embedding.
        layers: Widths of every layer.
        keys: Keys of ``per_layer_config`` that differ from the widths' names; None where a width
            is never written.
        count_keys: Config keys that hold how many experts there are.
        own_keys: The config's own keys of widths that it names otherwise.
        heads_stay: Whether no config of this model can state another head count: its layers would
            derive another head width from it.
        heads_divide_hidden: Whether stock configs refuse head counts that do not divide the
            hidden width.
        aliases: Config keys that win over another one of the config's.
        with_mlp_width: What a config says beside an MLP width of its own, for the MLP to have it.
    """

    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    layers: tuple[LayerGeometry, ...]
    keys: Mapping[str, str | None] = field(default_factory=dict)
    count_keys: tuple[str, ...] = ()
    own_keys: Mapping[str, str] = field(default_factory=dict)
    heads_stay: bool = False
    heads_divide_hidden: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    with_mlp_width: Mapping[str, Any] = field(default_factory=dict)

    def states_heads(self, layer: LayerGeometry) -> bool:
        """Whether a plain config, without ``per_layer_config``, can state a layer's head count.

        Args:
            layer: Its widths; with another head count than the model's, of a pruned one.
        """
        if self.heads_stay:
            whole = next((known for known in self.layers if known.has_attention), layer)
            return layer.num_key_value_heads == whole.num_key_value_heads
        return not self.heads_divide_hidden or self.hidden_size % layer.num_attention_heads == 0

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        keys: Mapping[str, str | None] | None = None,
        experts: Experts | None = None,
    ) -> "Geometry":
        """Read a Hugging Face config, with or without ``per_layer_config``.

        Args:
            config: The parsed ``config.json``, with the family's defaults where it leaves
                something open: see :meth:`Family.geometry`.
            keys: See :attr:`keys`.
            experts: The family's, where it has any.

        Raises:
            KeyError: A required width is absent.
        """
        keys = keys or {}
        if experts is not None:
            keys = {**keys, "num_experts": experts.counts[0], "top_k": experts.top_k}
        heads = config["num_attention_heads"]
        base = LayerGeometry(
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate_size=config["intermediate_size"],
            num_experts=config.get("num_experts") or 0 if experts else 0,
            top_k=config.get(experts.top_k) or 0 if experts else 0,
            expert_groups=_count(config, experts.groups if experts else None),
            groups_chosen=_count(config, experts.groups_chosen if experts else None),
        )
        overrides = {int(i): widths for i, widths in (config.get("per_layer_config") or {}).items()}
        # Most layers are alike, and a model has many.
        alike = {str(stated): stated for stated in overrides.values()}
        widths = {text: _overridden(base, stated, keys) for text, stated in alike.items()}
        return cls(
            hidden_size=config["hidden_size"],
            vocab_size=config["vocab_size"],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            layers=tuple(
                widths[str(overrides[i])] if i in overrides else base
                for i in range(config["num_hidden_layers"])
            ),
            keys=keys,
            count_keys=experts.counts if experts else (),
        )


def _count(config: Mapping[str, Any], key: str | None) -> int:
    """A count that is 1 where the config does not say."""
    return (config.get(key) if key else None) or 1


@dataclass(frozen=True)
class GgufFacts:
    """What llama.cpp's converter does to a family's tensors.

    Source: ``convert_hf_to_gguf.py`` of llama.cpp. Tensor names come from the gguf package.

    Attributes:
        architecture: The value of ``general.architecture``.
        rotary_permuted: Modules whose rows are reordered head by head, since llama.cpp rotates
            neighbouring rows where transformers rotates the halves of a head.
        made_contiguous: Fused modules whose parts alternate from one key/value head to the next in
            a checkpoint, and lie one after the other in a GGUF file: queries, keys, values.
    """

    architecture: str
    rotary_permuted: tuple[str, ...] = ()
    made_contiguous: tuple[str, ...] = ()


@dataclass(frozen=True)
class ActivationKeeps:
    """What an MLP's activation function keeps for its backward pass, beside its input.

    Attributes:
        numbers: Per channel, in the computation's type.
        masks: Per channel, of a byte each.
    """

    numbers: int = 0
    masks: int = 0


@dataclass(frozen=True)
class RoundedWidth:
    """An MLP width that is two thirds of the config's, times a factor, rounded up (LFM2).

    Attributes:
        switch: Config key that says whether it is; off, the config's width is the MLP's.
        multiplier: Config key of the factor.
        multiple_of: Config key of what the width is rounded up to a multiple of.
    """

    switch: str
    multiplier: str
    multiple_of: str

    def of(self, config: Mapping[str, Any]) -> int:
        """The MLP's width.

        Args:
            config: With its defaults, and with the switch on.

        Raises:
            KeyError: The config lacks one of the keys.
        """
        width = int(2 * config["intermediate_size"] / 3)
        if config[self.multiplier] is not None:
            width = int(config[self.multiplier] * width)
        step = config[self.multiple_of]
        return step * -(-width // step)


@dataclass(frozen=True)
class VllmFacts:
    """What vLLM's LoRA loader takes for a family.

    Source: ``registry.py``, the model classes and ``lora/`` of vLLM 0.33.

    Attributes:
        backend: ``vllm`` for a model class of vLLM's own, ``transformers`` where it wraps that of
            transformers.
        lora: Whether the class takes adapters at all.
        embeddings: Modules beside the linears that may have factors: ``embedding_modules``.
        refused: Linears, by the last part of their name, that its loader does not expect, since it
            knows only their parts (``packed_modules_mapping``).
    """

    backend: Literal["vllm", "transformers"] = "vllm"
    lora: bool = True
    embeddings: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def _overridden(
    base: LayerGeometry, stated: Mapping[str, Any], keys: Mapping[str, str | None]
) -> LayerGeometry:
    """One layer's widths: those that its entry states, else the base's."""
    widths = (*WIDTHS, *EXPERT_WIDTHS) if base.num_experts else WIDTHS
    named = {width: keys.get(width, width) for width in widths}
    return replace(
        base, **{w: stated[k] for w, k in named.items() if k is not None and k in stated}
    )


@dataclass(frozen=True, eq=False)
class Family:
    """A decoder family: which tensor is what.

    Attributes:
        family: Its name, and its file's.
        model_types: The ``model_type`` values of its configs.
        architecture: The causal LM class in transformers.
        layers: Full name of the module list of decoder layers.
        embedding: Full name of the input embedding.
        lm_head: Full name of the output head.
        norms: Norm weights and biases outside the layers, of the hidden width.
        modules: The linear modules of a decoder layer.
        layer_norms: Norm weights and biases of a decoder layer.
        layer_tensors: What else a layer holds: attention sinks, convolutions, learned scalars.
        outer_tensors: What else lies outside the layers, such as learned positions.
        ignored: Derived buffers that old checkpoints hold.
        lm_head_bias: Whether the head has a bias, or the config key that says so.
        heads_divide_hidden: Whether the config class refuses head counts that do not divide the
            hidden width.
        heads_stay: Whether stock layers take a width from the hidden size where the heads decide
            it, and so no other head count.
        heads_stay_rope: Types of rotary embedding with which the config class takes no other head
            count, since it works out the head's width from it.
        config_defaults: What a key means that ``config.json`` leaves out, where that is neither
            false nor derived from another key: files written by older tools lack such keys. A text
            is a product of numbers and other keys.
        config_aliases: Keys that stand for another one, and win over it where both are stated.
        config_keys: The config's own keys of widths that it names otherwise.
        config_rules: Objects with ``when`` and ``set``: what keys mean where a config says
            something else that decides them.
        stored_names: Beginnings of tensor names in published files, and of the module's name.
        requires: Keys and the one value that is supported.
        layer_kinds: How the config tells layers of different kinds apart; None where all are alike.
        attributes: Set for a family whose layer class cannot be built from its own widths (it
            derives the head's width from the head count): attributes inside a layer, by dotted
            name, and the width that each holds. Linears are cut to size.
        logits_multiplier: Config key of a factor on the logits.
        logits_divisor: Config key of what the logits are divided by.
        tuple_output: Whether the layer class returns a tuple, hidden states first.
        packs: Whether examples that share a row stay apart where positions begin anew: not where a
            state runs through the row, nor where the class makes its mask without positions.
        experts: What its experts are; None for a dense family.
        further_layers: Config key of how many layers files hold after the last one, which predict
            tokens further ahead; they are left out.
        activation_keeps: What the MLP's activation keeps beside its input.
        rounded_mlp: How the MLP's width follows from the config's; None where it is the same.
        gguf: How the family's GGUF files differ; None where llama.cpp does not know it.
        vllm: What vLLM's LoRA loader takes; None where nobody has looked.
    """

    family: str
    model_types: tuple[str, ...]
    architecture: str
    layers: str
    embedding: str
    lm_head: str
    norms: tuple[str, ...]
    modules: tuple[LinearModule, ...]
    layer_norms: tuple[LayerTensor, ...]
    ignored: tuple[str, ...] = ()
    layer_tensors: tuple[LayerTensor, ...] = ()
    outer_tensors: tuple[LayerTensor, ...] = ()
    lm_head_bias: bool | str = False
    heads_divide_hidden: bool = False
    heads_stay: bool = False
    heads_stay_rope: tuple[str, ...] = ()
    config_defaults: Mapping[str, Any] = field(default_factory=dict)
    config_aliases: Mapping[str, str] = field(default_factory=dict)
    config_keys: Mapping[str, str] = field(default_factory=dict)
    config_rules: tuple[Mapping[str, Condition], ...] = ()
    stored_names: Mapping[str, str] = field(default_factory=dict)
    requires: Condition = field(default_factory=dict)
    layer_kinds: LayerKinds | None = None
    attributes: Mapping[str, str] | None = None
    logits_multiplier: str | None = None
    logits_divisor: str | None = None
    tuple_output: bool = False
    packs: bool = True
    experts: Experts | None = None
    further_layers: str | None = None
    activation_keeps: ActivationKeeps = field(default_factory=ActivationKeeps)
    rounded_mlp: RoundedWidth | None = None
    gguf: GgufFacts | None = None
    vllm: VllmFacts | None = None

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Family":
        """Build a family from one parsed file of ``families/``."""
        modules = tuple(
            LinearModule(
                name=module["name"],
                rows=tuple(module.get("rows", ())),
                columns=tuple(module.get("columns", ())),
                bias=module.get("bias", False),
                interleaved=module.get("interleaved", False),
                kinds=tuple(module.get("kinds", ())),
                lora=module.get("lora", True),
                when=module.get("when", {}),
            )
            for module in data["modules"]
        )
        lists = {
            key: tuple(data.get(key, ()))
            for key in ("model_types", "norms", "ignored", "config_rules", "heads_stay_rope")
        }
        tensors = {
            key: tuple(LayerTensor.from_data(*item) for item in data.get(key, {}).items())
            for key in ("layer_norms", "layer_tensors", "outer_tensors")
        }
        kinds = data.get("layer_kinds")
        if kinds:
            kinds = LayerKinds(**{**kinds, "keys": tuple(kinds.get("keys", ()))})
        experts = Experts.from_data(data["experts"]) if "experts" in data else None
        classes: dict[str, Any] = {
            "gguf": GgufFacts,
            "vllm": VllmFacts,
            "activation_keeps": ActivationKeeps,
            "rounded_mlp": RoundedWidth,
        }
        facts = {
            key: kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in data[key].items()})
            for key, kind in classes.items()
            if key in data
        }
        return cls(
            **{
                **data,
                **lists,
                **tensors,
                "modules": modules,
                "layer_kinds": kinds,
                "experts": experts,
                **facts,
            }
        )

    @cached_property
    def lora_targets(self) -> tuple[str, ...]:
        """Last name parts of the decoder linears, as PEFT's ``target_modules`` wants them."""
        return tuple(dict.fromkeys(m.name.rsplit(".", 1)[-1] for m in self.modules if m.lora))

    @cached_property
    def lm_head_target(self) -> str:
        """The output head's name as a PEFT target."""
        return self.lm_head.rsplit(".", 1)[-1]

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The kinds of layer that the file tells apart; empty when all layers are alike."""
        items: list[LinearModule | LayerTensor] = [*self.modules, *self.layer_norms]
        return frozenset(kind for item in (*items, *self.layer_tensors) for kind in item.kinds)

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """The widths that a config of this family states or implies.

        Args:
            config: The parsed ``config.json``, with or without ``per_layer_config``.

        Raises:
            KeyError: A required width is absent.
            LoramError: The config asks for what the family's file does not cover.
        """
        full = self.full_config(config)
        for key, value in self.requires.items():
            if not _holds({key: value}, full):
                raise LoramError(
                    f"config.json: {key} {full.get(key)!r} is not supported for the family "
                    f"{self.family} (expected {value!r})"
                )
        keys = self.config_keys if self.attributes is None else _KEPT_KEYS
        geometry = Geometry.from_config(full, keys, self.experts)
        kinds = [""] * len(geometry.layers)
        if self.layer_kinds is not None:
            kinds = self.layer_kinds.of(full)
            unknown = set(kinds) - self.kinds
            if unknown:
                raise LoramError(
                    f"config.json: layers of kind {', '.join(sorted(unknown))} are not supported "
                    f"for the family {self.family}"
                )
        # A product is the same in every layer, and dearer to work out than to look up.
        fixed = tuple((axis, _product(axis, full)) for axis in self._products)
        absent = tuple(module.name for module in self.modules if not _holds(module.when, full))
        ranks = full.get(LOW_RANK) or {}

        # Most layers are alike, and a model has many.
        @cache
        def filled_in(
            layer: LayerGeometry, kind: str, ranks: tuple[tuple[str, int], ...]
        ) -> LayerGeometry:
            return replace(
                layer,
                kind=kind,
                has_attention=bool(self._axes_of(kind) & ATTENTION_AXES),
                has_mlp="intermediate" in self._axes_of(kind),
                has_experts=self.experts is not None and self._has_experts(kind),
                fixed=fixed,
                ranks=ranks,
                absent=absent,
            )

        layers = tuple(
            filled_in(layer, kind, tuple(ranks.get(str(i), {}).items()))
            for i, (layer, kind) in enumerate(zip(geometry.layers, kinds, strict=True))
        )
        return replace(
            geometry,
            layers=layers,
            own_keys=self.config_keys,
            heads_stay=self.heads_stay
            or self.attributes is not None
            or _rope_type(full) in self.heads_stay_rope,
            heads_divide_hidden=self.heads_divide_hidden,
            aliases=self.config_aliases,
            with_mlp_width={self.rounded_mlp.switch: False} if self.rounded_mlp else {},
        )

    def full_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config with what it leaves out: aliases, defaults and rules applied.

        Args:
            config: The parsed ``config.json``.
        """
        full = dict(config)
        for key, own in self.config_keys.items():
            # A stray key of the common name says nothing of such a model.
            full.pop(key, None)
            if full.get(own) is not None:
                full[key] = full[own]
        for alias, key in self.config_aliases.items():
            if full.get(alias) is not None:
                full[key] = full[alias]
        if self.experts is not None:
            # Whichever of the names a config has.
            stated = [full[key] for key in self.experts.counts if full.get(key) is not None]
            full |= {"num_experts": stated[0]} if stated else {}
        for key, value in self.config_defaults.items():
            if key not in full:
                full[key] = _product(value, full) if isinstance(value, str) else value
        if self.layer_kinds is not None and "num_hidden_layers" not in full:
            full["num_hidden_layers"] = len(self.layer_kinds.of(full))
        for rule in self.config_rules:
            if _holds(rule["when"], full):
                full.update(rule["set"])
        rounded = self.rounded_mlp
        if rounded is not None and full.get(rounded.switch):
            full |= {"intermediate_size": rounded.of(full), rounded.switch: False}
        return full

    def layer_prefix(self, layer: int) -> str:
        """Prefix of a layer's tensors, such as ``model.layers.3.``."""
        return f"{self.layers}.{layer}."

    def layer_modules(self, layer: LayerGeometry) -> tuple[LinearModule, ...]:
        """The linear modules that a layer of this kind has.

        Args:
            layer: Its widths.
        """
        return tuple(
            m
            for m in self.modules
            if (not m.kinds or layer.kind in m.kinds) and m.name not in layer.absent
        )

    def module_named(self, name: str) -> tuple[int, LinearModule] | None:
        """The layer index and module behind a full module name, or None if there is none.

        Args:
            name: Such as ``model.layers.3.self_attn.q_proj`` (no ``.weight``).
        """
        index, rest = self.layer_of(name)
        module = self._modules_by_name.get(rest)
        return None if index is None or module is None else (index, module)

    def tensor_named(self, name: str) -> tuple[int, LayerTensor] | None:
        """The layer index and tensor behind a full name that is no linear's, or None.

        Args:
            name: Such as ``model.layers.3.self_attn.q_norm.weight``.
        """
        index, rest = self.layer_of(name)
        tensor = self._tensors_by_name.get(rest)
        return None if index is None or tensor is None else (index, tensor)

    def adapted_weight(
        self, module: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> AdaptedWeight | None:
        """The weight that a module's LoRA factors change, or None if there is none.

        Args:
            module: As an adapter names it, such as ``model.layers.3.self_attn.q_proj``.
            shapes: Shape by name of the model's tensors.
        """
        shape = shapes.get(f"{module}.weight", ())
        if len(shape) == 2:
            return AdaptedWeight(f"{module}.weight", *shape)
        prefix, rest = self.split_layer(module)
        parameter = self.experts.factor_modules.get(rest) if self.experts is not None else None
        shape = shapes.get(f"{prefix}{parameter}", ())
        if self.experts is None or len(shape) != 3:
            return None
        transposed = self.experts.transposed
        rows, columns = reversed(shape[1:]) if transposed else shape[1:]
        return AdaptedWeight(f"{prefix}{parameter}", rows, columns, shape[0], transposed)

    def is_ignored(self, name: str) -> bool:
        """Whether a checkpoint tensor is a derived buffer that is safe to leave out."""
        return any(name.endswith(f".{suffix}") for suffix in self.ignored)

    def tensor_shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Every tensor that a checkpoint with this config must hold, with its shape.

        Tied heads are left out, since the file has only the embedding.
        """
        geometry = self.geometry(config)
        hidden = geometry.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            f"{self.embedding}.weight": (geometry.vocab_size, hidden)
        }
        full = self.full_config(config)
        inside = {layer: self._shapes_inside(layer, full) for layer in set(geometry.layers)}
        for i, layer in enumerate(geometry.layers):
            prefix = self.layer_prefix(i)
            shapes.update({prefix + name: shape for name, shape in inside[layer].items()})
        shapes.update(dict.fromkeys(self.norms, (hidden,)))
        for tensor in self.outer_tensors:
            shapes[tensor.name] = tuple(
                axis if isinstance(axis, int) else hidden if axis == "hidden" else
                _product(axis, full) for axis in tensor.shape
            )  # fmt: skip
        if not geometry.tied_embeddings:
            shapes[f"{self.lm_head}.weight"] = (geometry.vocab_size, hidden)
        bias = self.lm_head_bias
        if full.get(bias, False) if isinstance(bias, str) else bias:
            shapes[f"{self.lm_head}.bias"] = (geometry.vocab_size,)
        return shapes

    def linear_names(self, config: Mapping[str, Any]) -> Iterator[str]:
        """Full names of every decoder linear's weight.

        Args:
            config: The parsed ``config.json``.
        """
        for i, layer in enumerate(self.geometry(config).layers):
            ranks = dict(layer.ranks)
            for module in self.layer_modules(layer):
                name = f"{self.layer_prefix(i)}{module.name}"
                parts = FACTORS if module.name in ranks else ("",)
                yield from (f"{name}.{part}.weight" if part else f"{name}.weight" for part in parts)

    def expert_names(self, config: Mapping[str, Any]) -> Iterator[str]:
        """Full names of the experts' weights, each of all experts of a layer.

        Args:
            config: The parsed ``config.json``.
        """
        for i, layer in enumerate(self.geometry(config).layers):
            if self.experts is not None and layer.has_experts:
                for name in self.experts.parameters:
                    yield f"{self.layer_prefix(i)}{name}"

    def layer_shapes(
        self, index: int, layer: LayerGeometry, config: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        """Every tensor of one decoder layer with its shape.

        Args:
            index: The layer's place, for the names.
            layer: Its widths.
            config: The parsed ``config.json``.
        """
        prefix, full = self.layer_prefix(index), self.full_config(config)
        return {prefix + name: shape for name, shape in self._shapes_inside(layer, full).items()}

    def _shapes_inside(
        self, layer: LayerGeometry, full: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        """Every tensor of a decoder layer by its name inside it, with its shape."""
        hidden = full["hidden_size"]
        shapes: dict[str, tuple[int, ...]] = {}
        ranks = dict(layer.ranks)
        for module in self.layer_modules(layer):
            rows = sum(layer.axis_units(axis) for axis in module.rows) or hidden
            columns = sum(layer.axis_units(axis) for axis in module.columns) or hidden
            name, rank = module.name, ranks.get(module.name)
            if rank is None:
                shapes[f"{name}.weight"] = (rows, columns)
            else:
                first, name = f"{name}.{FACTORS[0]}", f"{name}.{FACTORS[1]}"
                shapes |= {f"{first}.weight": (rank, columns), f"{name}.weight": (rows, rank)}
            if full.get(module.bias, False) if isinstance(module.bias, str) else module.bias:
                shapes[f"{name}.bias"] = (rows,)
        for tensor in (*self.layer_norms, *self.layer_tensors):
            if _holds(tensor.when, full) and (not tensor.kinds or layer.kind in tensor.kinds):
                shapes[tensor.name] = layer.tensor_shape(tensor, hidden)
        return shapes

    @cached_property
    def _products(self) -> tuple[str, ...]:
        """Axes of the file that are products of config keys."""
        axes: list[Axis | int] = [axis for m in self.modules for axis in (*m.rows, *m.columns)]
        axes += [a for t in (*self.layer_norms, *self.layer_tensors) for a in t.shape]
        known = PRUNED_AXES | {"hidden", "head"}
        return tuple(dict.fromkeys(a for a in axes if isinstance(a, str) and a not in known))

    @cached_property
    def _modules_by_name(self) -> dict[str, LinearModule]:
        return {module.name: module for module in self.modules}

    @cached_property
    def _tensors_by_name(self) -> dict[str, LayerTensor]:
        return {tensor.name: tensor for tensor in (*self.layer_norms, *self.layer_tensors)}

    def split_layer(self, name: str) -> tuple[str, str]:
        """A tensor's name as its layer's prefix and the rest; two empty texts outside a layer.

        Args:
            name: Such as ``model.layers.3.mlp.gate.weight``.
        """
        index, rest = self.layer_of(name)
        return ("", "") if index is None else (self.layer_prefix(index), rest)

    def layer_of(self, name: str) -> tuple[int | None, str]:
        """A tensor's layer and its name inside it; None and an empty text outside a layer.

        Args:
            name: Such as ``model.layers.3.mlp.gate.weight``.
        """
        prefix = f"{self.layers}."
        index, _, rest = name.removeprefix(prefix).partition(".")
        layer = whole_number(index) if name.startswith(prefix) else None
        return (None, "") if layer is None else (layer, rest)

    def _axes_of(self, kind: str) -> frozenset[str]:
        """Axes that the modules of a kind of layer run over."""
        found = [m for m in self.modules if not m.kinds or kind in m.kinds]
        return frozenset(axis for m in found for axis in (*m.rows, *m.columns))

    def _has_experts(self, kind: str) -> bool:
        """Whether a kind of layer has experts."""
        return any(
            "experts" in t.shape and (not t.kinds or kind in t.kinds) for t in self.layer_tensors
        )


def _rope_type(config: Mapping[str, Any]) -> str | None:
    """The type of the rotary embedding that a config states, old or new; None where it does not."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("rope_type") or rope.get("type")


def _holds(condition: Condition, config: Mapping[str, Any]) -> bool:
    """Whether a config has all of the values."""
    # An absent switch, and one that is null or an empty list, is off.
    return all((config.get(key) or False) == (value or False) for key, value in condition.items())


def _product(axis: str, config: Mapping[str, Any]) -> int:
    """A sum of products of numbers and config keys, such as ``2*num_groups*state_size+width``.

    Raises:
        KeyError: The config lacks one of the keys.
    """
    return sum(
        math.prod(int(f) if f.isdigit() else config[f] for f in term.split("*"))
        for term in axis.split("+")
    )
