"""Sanity of the numbers in a ``config.json``, before anything is computed from them."""

from collections.abc import Iterator, Mapping
from typing import Any

from loram_cli.arch.registry import families
from loram_cli.arch.spec import LOW_RANK
from loram_cli.checkpoint.config_values import short
from loram_cli.errors import LoramError
from loram_cli.units import whole_number

# Far above any model there is; what lies beyond is damage, and would be computed with for hours.
_HIGHEST = {"num_hidden_layers": 10_000}
_HIGHEST_ELSE = 2**31
_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_hidden_layers",
    "vocab_size",
)
# A config may hold these as null: the model then derives them from others.
_DERIVED = ("num_key_value_heads", "head_dim")
_LONGEST_NAME = 100


_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)


def check_required(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config of a known family that lacks a width which every model has.

    Raises:
        LoramError: A width is absent.
    """
    for family in families():
        if config.get("model_type") in family.model_types:
            try:
                full = family.full_config(config)
            except KeyError as error:
                raise LoramError(f"{where}: has no {error.args[0]}") from error
            for key in _REQUIRED:
                if key not in full:
                    raise LoramError(f"{where}: has no {key}")


def check_widths(config: Mapping[str, Any], where: str) -> None:
    """Refuse widths that are no whole numbers of a plausible range.

    Keys that a config does not have are not asked for here: which ones a model needs is its
    family's business.

    Raises:
        LoramError: A width is of another type or out of range.
    """
    model_type = config.get("model_type", "")
    if not isinstance(model_type, str) or len(model_type) > _LONGEST_NAME:
        raise LoramError(f"{where}: model_type is no name ({short(model_type)})")
    _check(config, where)
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise LoramError(
            f"{where}: {heads} attention heads cannot share {groups} key/value heads evenly"
        )
    for layer, widths in _by_layer(config, "per_layer_config", where):
        _check(widths, f"{where}: per_layer_config {layer}")
    for layer, ranks in _by_layer(config, LOW_RANK, where):
        for name, rank in ranks.items():
            if type(rank) is not int or not 0 < rank < _HIGHEST_ELSE:
                raise LoramError(
                    f"{where}: {LOW_RANK} {layer}: {short(name)} has rank {short(rank)}, expected "
                    "a whole number above 0"
                )


def _by_layer(
    config: Mapping[str, Any], key: str, where: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The entries of a key that says something of single layers.

    Raises:
        LoramError: It is no mapping, or one of its entries is of no layer or no mapping.
    """
    layers = config.get(key) or {}
    if not isinstance(layers, Mapping):
        raise LoramError(f"{where}: {key} is no mapping ({short(layers)})")
    count = config.get("num_hidden_layers", _HIGHEST["num_hidden_layers"])
    for layer, values in layers.items():
        number = whole_number(str(layer))
        if number is None or number >= count or not isinstance(values, Mapping):
            raise LoramError(f"{where}: {key} has no sound entry {short(layer)}")
        yield layer, values


def _check(values: Mapping[str, Any], where: str) -> None:
    for key in _WIDTHS:
        value = values.get(key)
        if key not in values or (value is None and key in _DERIVED):
            continue
        highest = _HIGHEST.get(key, _HIGHEST_ELSE)
        if type(value) is not int or not 0 < value <= highest:
            raise LoramError(
                f"{where}: {key} is {short(value)}, expected a whole number from 1 to {highest}"
            )
