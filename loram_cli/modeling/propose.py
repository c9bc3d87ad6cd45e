"""Proposes a family file for an architecture that no file knows, from transformers' own modules.

The model is built small, on torch's meta device, a few times with one width changed at a time. How
much an axis grows with a width says what it runs over; which tensors come and go with a config's
switches says what they depend on. One tiny model is run, for what its shapes cannot say: what
becomes of the logits, and what a layer returns.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from loram_cli.arch.spec import Family
from loram_cli.errors import LoramError, reason_of
from loram_cli.modeling.probe_groups import narrow_failure, told_apart, with_interleaved
from loram_cli.quiet import quiet_libraries

Shapes = dict[str, tuple[int, ...]]

# Every product and sum of them that a layer is made of differs.
_PROBE = {
    "hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 20,
    "intermediate_size": 72, "vocab_size": 258, "num_hidden_layers": 4, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
_GROWN = {
    "hidden": {"hidden_size": 192},
    "query": {"num_attention_heads": 16},
    "key_value": {"num_key_value_heads": 8},
    "head": {"head_dim": 40},
    "intermediate": {"intermediate_size": 144},
}
_WIDTHS = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "num_hidden_layers", "vocab_size",
)  # fmt: skip
# How configs name the MLP's width that do not call it intermediate_size.
_MLP_WIDTH = re.compile("ffn|ff_dim|inner|mlp_dim")
# What a config may leave to be derived from other widths.
_DERIVED = ("head_dim", "num_key_value_heads")
_POSITIONS = "max_position_embeddings"
_NARROW = ("rotary_dim",)
_DEFAULTED = ("tie_word_embeddings", "head_dim", "num_key_value_heads")
_LOGIT_SCALE = 3.5
_LONG_LINE = 80


class _Probe:
    """Small models of one architecture."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.model_type: str = config["model_type"]
        self.own_keys: dict[str, str] = {}
        default = self.default = self._native({})
        names = dict(getattr(type(default), "attribute_map", None) or {})
        self.own_keys |= {width: names[width] for width in _WIDTHS if width in names}
        self.positions = names.get(_POSITIONS, _POSITIONS)
        # What must be no wider than a head for a tiny model to run.
        self.narrow = {key: 4 for key in _NARROW if hasattr(default, key)}
        self.switches = sorted(k for k, v in default.to_dict().items() if isinstance(v, bool))
        self.scales = sorted(
            k for k, v in default.to_dict().items() if "logit" in k and isinstance(v, float)
        )
        # Switches as the model has them, and the kinds of its first layers.
        self.stated = {k: config[k] for k in self.switches if k in config}
        self.stated["tie_word_embeddings"] = False
        # Some configs work the head's width out, and refuse to be told.
        derived = isinstance(getattr(type(default), "head_dim", None), property)
        absent = {"head_dim"} if derived else set()
        if not hasattr(default, "num_key_value_heads"):
            absent.add("num_key_value_heads")
        self.widths = {k: v for k, v in _PROBE.items() if k not in absent}
        self.stray = sorted({*absent, *(k for k in _DERIVED if not hasattr(default, k))})
        kinds = getattr(self._native({**self.widths, **self.stated}), "layer_types", None)
        self.kinds = {} if kinds is None else {"layer_types": list(kinds)}
        self.mlp_width_times_hidden: int | None = None
        if not hasattr(default, "intermediate_size"):
            self._find_mlp_width(default)

    def _native(self, changes: Mapping[str, Any]) -> Any:
        import transformers

        with quiet_libraries():
            return transformers.AutoConfig.for_model(self.model_type, **self.named(changes))

    def _find_mlp_width(self, default: Any) -> None:
        """The config's own key of the MLP's width, which it does not call intermediate_size."""
        width, grown = _PROBE["intermediate_size"], _GROWN["intermediate"]["intermediate_size"]
        for key, value in default.to_dict().items():
            if not _MLP_WIDTH.search(key) or not (value is None or type(value) is int):
                continue
            narrow, wide = self.shapes(**{key: width}), self.shapes(**{key: grown})
            if narrow is None or wide is None or narrow == wide:
                continue
            self.own_keys["intermediate_size"] = key
            absent = self.shapes(**{key: None}) if value is None else None
            if absent is not None:
                name = next(n for n in narrow if narrow[n] != wide[n])
                axis = next(i for i, size in enumerate(narrow[name]) if size != wide[name][i])
                self.mlp_width_times_hidden = absent[name][axis] // _PROBE["hidden_size"]
            return

    def named(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Widths under the config's own keys."""
        return {self.own_keys.get(key, key): value for key, value in changes.items()}

    def config(self, **changes: Any) -> dict[str, Any]:
        """What ``config.json`` would say."""
        fixed = {"model_type": self.model_type, **self.widths, **self.kinds}
        return self.named({**fixed, **self.stated, **changes})

    def model(self, device: str = "meta", **changes: Any) -> Any:
        """A small model, its widths changed as told."""
        import transformers

        with quiet_libraries(), torch.device(device):
            native = self._native({**self.widths, **self.stated, **changes})
            return transformers.AutoModelForCausalLM.from_config(native).eval()

    def shapes(self, **changes: Any) -> Shapes | None:
        """Shapes by tensor name; None where the architecture refuses such widths."""
        try:
            return stored_shapes(self.model(**changes))
        except (ValueError, TypeError, RuntimeError, AttributeError, AssertionError):
            return None
        except Exception as error:
            # huggingface_hub's own validation error is no ValueError.
            if "Validation" not in type(error).__name__:
                raise
            return None

    def refuses_odd_heads(self) -> bool:
        """Whether the config class refuses head counts that do not divide the hidden width."""
        odd = {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 16}
        try:
            self._native({**self.widths, **self.kinds, **odd})
        except Exception as error:
            # Each config class has its own way to refuse a value.
            return "attention heads" in str(error).replace("\n", " ")
        return False

    def defaults(self, switches: Collection[str]) -> dict[str, Any]:
        """What an absent key means, where that is neither false nor derived from another.

        Args:
            switches: Keys that tensors depend on.
        """
        native = self._native({})
        found = {key: getattr(native, key, None) for key in (*_DEFAULTED, *switches)}
        # A head width that follows from the others, and as many groups as heads, are no defaults.
        small = self._native({"hidden_size": 96, "num_attention_heads": 8})
        return {
            key: value
            for key, value in found.items()
            if value and getattr(small, key, None) == value
        }


def stored_shapes(model: Any) -> Shapes:
    """Shapes of what a checkpoint of a model holds: parameters, and buffers that are stored.

    Args:
        model: With an untied head.
    """
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def propose_family(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Propose a family file for the architecture of a config.

    Args:
        config: A parsed ``config.json``; its ``model_type`` must be one that transformers knows.

    Returns:
        The file's content, as :meth:`~loram_cli.arch.spec.Family.from_data` takes it, and remarks
        on what could not be told from the modules and has to be checked.

    Raises:
        LoramError: transformers has no such causal LM, or it is not one stack of decoder layers.
    """
    try:
        probe = _Probe(config)
        model = probe.model()
    except Exception as error:
        # Each config class has its own way to refuse a value.
        raise LoramError(
            f"model_type {config.get('model_type')!r}: transformers builds no small causal LM "
            f"of it ({reason_of(error)})"
        ) from error
    try:
        return _proposal(probe, model)
    except (KeyError, IndexError, StopIteration, AttributeError) as error:
        raise LoramError(
            f"model_type {probe.model_type!r}: its modules are not those of a plain decoder "
            f"({reason_of(error)})",
            "nothing can be proposed: write the family file by hand",
        ) from error


def _proposal(probe: _Probe, model: Any) -> tuple[dict[str, Any], list[str]]:
    """See :func:`propose_family`; the model is the plain probe."""
    remarks: list[str] = []
    layers = _stack_name(model, probe.model_type)
    if any(type(part).__name__ == "Conv1D" for part in model.get_submodule(layers).modules()):
        raise LoramError(
            f"model_type {probe.model_type!r}: its linears are transformers' Conv1D, which holds "
            "weights transposed; such families are not supported"
        )
    embedding, head = (
        next(name for name, module in model.named_modules() if module is part)
        for part in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    shapes = stored_shapes(model)
    axes = _Axes(probe, shapes, remarks)
    conditions = _conditions(probe, remarks)
    linears = _linears(model, layers)
    kinds = _kinds(probe, model, layers)
    data: dict[str, Any] = {
        "family": probe.model_type,
        "model_types": [probe.model_type],
        "architecture": type(model).__name__,
        "layers": layers,
        "embedding": embedding,
        "lm_head": head,
    }
    inside, outside = _split(shapes, conditions, layers)
    known = {f"{embedding}.weight", f"{head}.weight", f"{head}.bias"}
    data["norms"] = [n for n in outside if n not in known and shapes[n] == (_PROBE["hidden_size"],)]
    unknown = [name for name in outside if name not in known and name not in data["norms"]]
    if unknown:
        data["outer_tensors"] = {name: axes.outside(name, shapes[name]) for name in unknown}
    data["modules"] = [_module(name, inside, axes, conditions, layers, kinds) for name in linears]
    plain = [n for n in inside if n.rpartition(".")[0] not in linears]
    norms = {n: _tensor(n, inside[n], axes, conditions, layers, kinds) for n in plain}
    data["layer_norms"] = {n: t for n, t in norms.items() if "norm" in n}
    others = {n: t for n, t in norms.items() if "norm" not in n}
    if others:
        data["layer_tensors"] = others
        remarks.append(f"tensors that are neither linear nor norm: {', '.join(others)}")
    if f"{head}.bias" in shapes:
        data["lm_head_bias"] = True
    if kinds:
        data["layer_kinds"] = {"keys": ["layer_types"]}
    if not axes.own_head_width:
        data["attributes"] = _head_counts(probe, layers)
        if probe.stray:
            # Stray keys of those names say nothing of such a model.
            data["config_rules"] = [{"when": {}, "set": dict.fromkeys(probe.stray)}]
        remarks.append(
            "the layer class derives a head's width from the head count: query and key_value were "
            "told by the modules' names, and 'attributes' by what grows with the heads"
        )
    elif probe.refuses_odd_heads():
        data["heads_divide_hidden"] = True
    defaults = probe.defaults(list(dict.fromkeys(switch for switch, _, _ in conditions.values())))
    if any(
        probe.positions in str(axis) for t in data.get("outer_tensors", {}).values() for axis in t
    ):
        defaults[probe.positions] = getattr(probe.default, _POSITIONS)
    if probe.mlp_width_times_hidden:
        defaults["intermediate_size"] = f"{probe.mlp_width_times_hidden}*hidden_size"
    if defaults:
        data["config_defaults"] = defaults
    if probe.own_keys:
        data["config_keys"] = probe.own_keys
    _add_what_running_tells(probe, data, remarks)
    _check(probe, data, remarks)
    return data, remarks


def render_family(data: Mapping[str, Any]) -> str:
    """A proposal as the text of a file, one module a line.

    Args:
        data: From :func:`propose_family`.
    """
    blocks = []
    for key, value in data.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"    {json.dumps(v)}" for v in value) + "\n  ]"
        elif isinstance(value, dict) and len(text) > _LONG_LINE:
            lines = (f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            text = "{\n" + ",\n".join(lines) + "\n  }"
        blocks.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def _stack_name(model: Any, model_type: str) -> str:
    stacks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == _PROBE["num_hidden_layers"]
    ]
    if len(stacks) != 1:
        raise LoramError(f"model_type {model_type!r}: {len(stacks)} stacks of layers, expected one")
    return stacks[0]


def _kinds(probe: _Probe, model: Any, layers: str) -> dict[str, set[str]]:
    """Tensor names by kind of layer, where kinds differ in them; else nothing."""
    stated = getattr(model.config, "layer_types", None)
    found: dict[str, set[str]] = {}
    for kind, layer in zip(stated or (), model.get_submodule(layers), strict=False):
        found.setdefault(kind, set()).update(layer.state_dict())
    return found if len({frozenset(names) for names in found.values()}) > 1 else {}


def _linears(model: Any, layers: str) -> list[str]:
    """Names of linear modules inside a layer, in order, of layers of all kinds."""
    names = [
        name
        for layer in model.get_submodule(layers)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    return list(dict.fromkeys(names))


def _split(
    shapes: Shapes, conditions: "dict[str, tuple[str, bool, tuple[int, ...]]]", layers: str
) -> tuple[Shapes, list[str]]:
    """Tensors inside a layer, by name there, and full names outside."""
    everything = shapes | {name: shape for name, (_, _, shape) in conditions.items()}
    inside: Shapes = {}
    outside: list[str] = []
    for name, shape in everything.items():
        if name.startswith(f"{layers}."):
            inside.setdefault(name.removeprefix(f"{layers}.").partition(".")[2], shape)
        else:
            outside.append(name)
    return inside, outside


def _conditions(probe: _Probe, remarks: list[str]) -> dict[str, tuple[str, bool, tuple[int, ...]]]:
    """Tensors that a switch of the config brings: the switch, its value, and the shape."""
    found: dict[str, tuple[str, bool, tuple[int, ...]]] = {}
    for switch in probe.switches:
        if switch == "tie_word_embeddings":
            continue
        off, on = (probe.shapes(**{switch: value}) for value in (False, True))
        if off is None or on is None:
            if on is not None or off is not None:
                remarks.append(f"{switch} cannot be {'on' if on is None else 'off'} in a probe")
            continue
        for value, more, fewer in ((True, on, off), (False, off, on)):
            found |= {n: (switch, value, s) for n, s in more.items() if n not in fewer}
    return found


class _Axes:
    """What an axis runs over, from how it grows with each width."""

    def __init__(self, probe: _Probe, shapes: Shapes, remarks: list[str]) -> None:
        self._probe, self._remarks = probe, remarks
        self.grown = {w: probe.shapes(**changes) for w, changes in _GROWN.items()}
        base = shapes
        head = self.grown["head"]
        self.own_head_width = head is not None and any(head[name] != base[name] for name in base)
        self._with_switch: dict[str, dict[str, Shapes | None]] = {}

    def of(self, name: str, shape: tuple[int, ...], switch: Mapping[str, bool]) -> list[list[Any]]:
        """Widths of every axis of a tensor; a list of segments for each.

        Args:
            name: Full name.
            shape: In the probe.
            switch: What the config must say for it to be there.
        """
        grown = self.grown
        if switch:
            key = str(sorted(switch.items()))
            if key not in self._with_switch:
                self._with_switch[key] = {
                    w: self._probe.shapes(**{**changes, **switch}) for w, changes in _GROWN.items()
                }
            grown = self._with_switch[key]
        return [self._segments(name, axis, size, grown) for axis, size in enumerate(shape)]

    def outside(self, name: str, shape: tuple[int, ...]) -> list[Any]:
        """Widths of every axis of a tensor outside the layers.

        Args:
            name: Full name.
            shape: In the probe.
        """
        longer = self._probe.shapes(**{self._probe.positions: 2 * _PROBE[_POSITIONS]})
        found: list[Any] = []
        for axis, size in enumerate(shape):
            wide = self.grown["hidden"]
            if wide is not None and wide[name][axis] == 2 * size == 2 * _PROBE["hidden_size"]:
                found.append("hidden")
            elif longer is not None and longer[name][axis] == size + _PROBE[_POSITIONS]:
                more = size - _PROBE[_POSITIONS]
                found.append(f"{self._probe.positions}+{more}" if more else self._probe.positions)
            else:
                found.append(size)
        if any(isinstance(axis, int) for axis in found):
            self._remarks.append(
                f"{name}: no probed width changes the plain numbers of its shape; write them as "
                "products of config keys"
            )
        return found

    def _segments(
        self, name: str, axis: int, size: int, grown: Mapping[str, Shapes | None]
    ) -> list[Any]:
        def growth(width: str) -> int:
            shapes = grown[width]
            return 0 if shapes is None or name not in shapes else shapes[name][axis] - size

        narrows = growth("query") < 0
        if not self.own_head_width and growth("hidden") and _is_attention(name) and not narrows:
            return _by_name(name, axis)
        head = _PROBE["head_dim"]
        if narrows and not self.own_head_width:
            # Its layers are built at the base's widths, so that the norm keeps its own.
            return ["head"]
        if narrows:
            self._remarks.append(
                f"{name} narrows as heads are added: a pruned layer would not have its width; "
                "refuse the config that has it by 'requires'"
            )
            return ["head"]
        found: list[Any] = []
        hidden = growth("hidden") // _PROBE["hidden_size"]
        if hidden:
            found = ["hidden"] if hidden == 1 else [f"{hidden}*hidden_size"]
        for width, heads in (("query", 8), ("key_value", 4)):
            count, rest = divmod(growth(width), heads * head)
            found += [width] * count
            if rest:
                found.append(f"{width}_heads" if width == "query" else "key_value_heads")
        found += ["intermediate"] * (growth("intermediate") // _PROBE["intermediate_size"])
        if not found and growth("head"):
            found = ["head"]
        return found or [size]


def _head_counts(probe: _Probe, layers: str) -> dict[str, str]:
    """Attributes inside a layer that hold a head count, by dotted name, with the width's."""

    def numbers(**changes: Any) -> dict[str, int]:
        layer = probe.model(**changes).get_submodule(layers)[0]
        return {
            f"{path}.{name}" if path else name: value
            for path, module in layer.named_modules()
            for name, value in vars(module).items()
            if type(value) is int
        }

    base = numbers()
    found: dict[str, str] = {}
    for width in ("num_attention_heads", "num_key_value_heads"):
        count = _PROBE[width]
        try:
            grown = numbers(**{width: 2 * count})
        except (ValueError, TypeError, RuntimeError, AttributeError, AssertionError):
            continue
        found |= {n: width for n, v in base.items() if v == count and grown.get(n) == 2 * count}
    return found


def _is_attention(name: str) -> bool:
    return "attn" in name or "attention" in name.rpartition(".")[0].rpartition(".")[0]


def _by_name(name: str, axis: int) -> list[Any]:
    """The widths of an attention module's axis where they all equal the hidden width."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    fused = "qkv" in module.lower() or ("query" in module and "key" in module)
    out = module.startswith(("o_", "out", "dense"))
    if axis == (1 if out else 0) and "norm" not in module and not (out and "bias" in name):
        if fused:
            return ["query", "key_value", "key_value"]
        return ["key_value" if module.startswith(("k", "v")) else "query"]
    return ["hidden"]


def _condition_of(
    name: str, conditions: Mapping[str, tuple[str, bool, tuple[int, ...]]], layers: str
) -> dict[str, bool]:
    """The switch that a tensor inside a layer depends on, as ``when`` states it."""
    for full, (switch, value, _) in conditions.items():
        if full.removeprefix(f"{layers}.").partition(".")[2] == name:
            return {switch: value}
    return {}


def _kinds_of(name: str, kinds: Mapping[str, set[str]]) -> list[str]:
    having = [kind for kind, names in kinds.items() if name in names]
    return [] if len(having) in (0, len(kinds)) else having


def _full_name(name: str, layers: str, kinds: Mapping[str, set[str]], axes: _Axes) -> str:
    shapes = next(s for s in axes.grown.values() if s is not None)
    count = _PROBE["num_hidden_layers"]
    places = [f"{layers}.{i}.{name}" for i in range(count)]
    return next((place for place in places if place in shapes), places[0])


def _module(
    name: str,
    inside: Shapes,
    axes: _Axes,
    conditions: Mapping[str, tuple[str, bool, tuple[int, ...]]],
    layers: str,
    kinds: Mapping[str, set[str]],
) -> dict[str, Any]:
    weight = f"{name}.weight"
    rows, columns = axes.of(_full_name(weight, layers, kinds, axes), inside[weight], {})
    module: dict[str, Any] = {"name": name}
    if rows != ["hidden"]:
        module["rows"] = [str(axis) for axis in rows]
    if columns != ["hidden"]:
        module["columns"] = [str(axis) for axis in columns]
    if f"{name}.bias" in inside:
        when = _condition_of(f"{name}.bias", conditions, layers)
        module["bias"] = next(iter(when), True)
    having = _kinds_of(weight, kinds)
    if having:
        module["kinds"] = having
    return module


def _tensor(
    name: str,
    shape: tuple[int, ...],
    axes: _Axes,
    conditions: Mapping[str, tuple[str, bool, tuple[int, ...]]],
    layers: str,
    kinds: Mapping[str, set[str]],
) -> Any:
    when = _condition_of(name, conditions, layers)
    segments = axes.of(_full_name(name, layers, kinds, axes) if not when else
                       f"{layers}.0.{name}", shape, when)  # fmt: skip
    widths: list[Any] = [s[0] if len(s) == 1 else "*".join(map(str, s)) for s in segments]
    extra: dict[str, Any] = {"when": when} if when else {}
    having = _kinds_of(name, kinds)
    if having:
        extra["kinds"] = having
    plain = widths[0] if len(widths) == 1 else widths
    return {"shape": plain, **extra} if extra else plain


def _add_what_running_tells(probe: _Probe, data: dict[str, Any], remarks: list[str]) -> None:
    """What becomes of the head's output, and what a layer returns: read off one forward pass."""
    seen: dict[str, Any] = {}
    torch_state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        scales = {key: _LOGIT_SCALE + i for i, key in enumerate(probe.scales)}
        caps = [key for key in scales if "softcap" in key]
        # As wide as the residual stream: some layers cannot do without.
        head = {"head_dim": _PROBE["hidden_size"] // _PROBE["num_attention_heads"]}
        widths = head if "head_dim" in probe.widths else {}
        changes = {**widths, **probe.narrow, **scales, **dict.fromkeys(caps)}
        model = probe.model("cpu", **changes)

        ids = torch.arange(1, 13)[None]
        packs = _packs(model, ids)

        def keep(name: str) -> Callable[..., None]:
            return lambda _module, _args, out: seen.update({name: out})

        watched = (model.get_submodule(data["lm_head"]), model.get_submodule(data["layers"])[0])
        hooks = [
            module.register_forward_hook(keep(name))
            for name, module in zip(("head", "layer"), watched, strict=True)
        ]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
    except Exception as error:
        # A model that cannot be run is no reason to propose nothing.
        remarks.append(f"the probe could not be run ({reason_of(error, most=80)}): check the "
                       "logits' scale and what a layer returns")  # fmt: skip
        return
    finally:
        torch.random.set_rng_state(torch_state)
    _tell_groups(probe.config(**changes), data, model, ids, remarks)
    if isinstance(seen["layer"], tuple):
        data["tuple_output"] = True
    if not packs:
        data["packs"] = False
    largest = seen["head"].abs().argmax()
    ratio = float(logits.flatten()[largest] / seen["head"].flatten()[largest])
    if not torch.allclose(logits, seen["head"] * ratio, rtol=1e-3, atol=1e-5):
        remarks.append("the logits are not the head's output times a number: check the loss")
    elif abs(ratio - 1) > 1e-4:
        for key, value in scales.items():
            if abs(ratio - value) < 1e-3:
                data["logits_multiplier"] = key
                return
            if abs(ratio - 1 / value) < 1e-3:
                data["logits_divisor"] = key
                return
        remarks.append(f"the logits are {ratio:.4g} times the head's output: no key told why")


def _tell_groups(
    config: Mapping[str, Any],
    data: dict[str, Any],
    model: Any,
    ids: torch.Tensor,
    remarks: list[str],
) -> None:
    """Whether heads and channels stand for themselves, and how fused modules order them."""
    for axis, name in (("query", "heads"), ("intermediate", "channels")):
        fused = [m for m in data["modules"] if len(m.get("rows", ())) > 1 and axis in m["rows"]]
        try:
            family = Family.from_data(data)
            if told_apart(model, family, config, ids, axis):
                continue
            other = with_interleaved(family, axis) if fused else None
            if other is not None and told_apart(model, other, config, ids, axis):
                for module in fused:
                    module["interleaved"] = True
                continue
        except (KeyError, IndexError, RuntimeError, LoramError, AttributeError):
            # Of a proposal whose shapes do not hold either, which is said elsewhere.
            pass
        remarks.append(
            f"{name} were not told apart: a change of one reached others, so that the rows or the "
            f"order of segments are wrong, or {name} work together and none may be dropped"
        )
    try:
        failure = narrow_failure(Family.from_data(data), config, ids)
    except (KeyError, LoramError, ZeroDivisionError):
        # As above.
        return
    if failure is not None:
        remarks.append(
            f"a layer with fewer heads and channels does not run ({reason_of(failure, most=80)}): "
            "its class takes a width from elsewhere; complete 'attributes', or do not prune heads"
        )


def _packs(model: Any, ids: torch.Tensor) -> bool:
    """Whether two examples in a row, the second's positions beginning anew, stay apart.

    Args:
        model: On the CPU.
        ids: Tokens of shape (1, length).
    """
    half = ids.shape[1] // 2
    positions = torch.arange(half).repeat(2)[None]
    with torch.no_grad():
        try:
            both = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        except (TypeError, ValueError, RuntimeError):
            return False
        second = model(input_ids=ids[:, half:], use_cache=False).logits
    return torch.allclose(both[:, half:], second, rtol=1e-3, atol=1e-5)


def _check(probe: _Probe, data: dict[str, Any], remarks: list[str]) -> None:
    """Hold the proposal against models of other widths, and say where it is off."""
    axes = {m["name"]: (*m.get("rows", ()), *m.get("columns", ())) for m in data["modules"]}
    numbers = sorted(name for name, found in axes.items() if any(a.isdigit() for a in found))
    if numbers:
        remarks.append(
            f"{', '.join(numbers)}: no probed width changes the plain numbers among their axes; "
            "write them as products of config keys"
        )
    if not any("query" in module.get("columns", ()) for module in data["modules"]):
        remarks.append(
            "no module reads the query heads: the attention's output projection is as wide as the "
            "residual stream; write its columns as query"
        )
    family = Family.from_data(data)
    for changes in ({}, *_GROWN.values()):
        shapes = probe.shapes(**changes)
        if shapes is None:
            continue
        try:
            expected = family.tensor_shapes(probe.config(**changes))
        except (KeyError, LoramError, ZeroDivisionError) as error:
            remarks.append(f"the proposal gives no shapes ({error!r})")
            return
        wrong = [n for n in shapes.keys() | expected if shapes.get(n) != expected.get(n)]
        if wrong:
            remarks.append(
                f"with {changes or 'the plain widths'}, {len(wrong)} tensors differ, such as "
                f"{sorted(wrong)[0]}"
            )
            return
