"""Which tensor lies where: an index over a directory's safetensors shards."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loram_cli.arch.experts import Experts
from loram_cli.arch.registry import families, family_for
from loram_cli.arch.spec import Family
from loram_cli.arch.wrappers import text_view, wrapper_of
from loram_cli.checkpoint.config_values import check_values
from loram_cli.checkpoint.header import Piece, TensorEntry, read_header
from loram_cli.checkpoint.json_files import read_json as read_json
from loram_cli.checkpoint.low_bit import CONFIG_KEY, LowBit, as_weight
from loram_cli.checkpoint.mxfp4 import takes_mxfp4, with_float_experts
from loram_cli.checkpoint.widths import check_required, check_widths
from loram_cli.errors import LoramError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class CheckpointIndex:
    """All tensors of a directory, in the order of their shards and offsets.

    Attributes:
        directory: Of the checkpoint.
        tensors: By name; of a multimodal model those of its text model, under their names there.
        others: Of a multimodal model, the tensors of its other parts.
    """

    directory: Path
    tensors: Mapping[str, TensorEntry]
    others: Mapping[str, TensorEntry] = field(default_factory=dict)

    @property
    def whole(self) -> "CheckpointIndex":
        """The index over the tensors of all parts."""
        return replace(self, tensors={**self.tensors, **self.others}, others={})

    @classmethod
    def open(cls, directory: Path) -> "CheckpointIndex":
        """Read and check the headers of every shard; no tensor is read.

        Raises:
            LoramError: No safetensors, a missing or truncated shard, a header that lies, an index
                that disagrees with its shards or names a path outside the directory.
        """
        tensors: dict[str, TensorEntry] = {}
        weight_map = _weight_map(directory)
        for shard_name in sorted(set(weight_map.values())) if weight_map else [SINGLE_NAME]:
            for entry in read_header(directory / shard_name):
                if entry.name in tensors:
                    raise LoramError(f"{directory}: tensor {entry.name} stands in two shards")
                tensors[entry.name] = entry
        for name, shard_name in weight_map.items():
            if name not in tensors or tensors[name].file.name != shard_name:
                raise LoramError(
                    f"{directory / shard_name}: tensor {name} is missing from the shard"
                )
        config = directory / "config.json"
        stated = read_json(config) if config.is_file() else {}
        wrapper = wrapper_of(stated)
        if wrapper is None:
            tensors = _with_module_names(directory, stated, tensors)
            return cls(directory, _with_weights(directory, tensors))
        names = {name: wrapper.text_tensor(name) for name in tensors}
        mine = {own: tensors[name] for name, own in names.items() if own is not None}
        return cls(directory, mine, {n: e for n, e in tensors.items() if names[n] is None})

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    @property
    def num_params(self) -> int:
        """Elements of all tensors together."""
        return sum(math.prod(entry.shape) for entry in self.tensors.values())

    def entry_of(self, name: str, shape: Sequence[int]) -> TensorEntry:
        """The entry of a tensor that a model wants.

        Raises:
            LoramError: It is absent, or of another shape.
        """
        entry = self.tensors.get(name)
        if entry is None or entry.shape != tuple(shape):
            found = "absent" if entry is None else f"of shape {list(entry.shape)}"
            raise LoramError(
                f"{self.directory}: tensor {name} is {found}, the model wants {list(shape)}"
            )
        return entry

    def check_shapes(
        self, expected: Mapping[str, tuple[int, ...]], ignored: Callable[[str], bool]
    ) -> None:
        """Compare with the shapes that the config promises.

        Args:
            expected: Shape by tensor name.
            ignored: Predicate on names that may stand in the file without being expected.

        Raises:
            LoramError: A tensor is missing, unexpected, of another shape or of no real numbers.
        """
        for name, shape in expected.items():
            entry = self.tensors.get(name)
            if entry is None:
                raise LoramError(f"{self.directory}: tensor {name} is missing from the weights")
            if entry.shape != shape:
                raise LoramError(
                    f"{entry.file}: tensor {name} has shape {list(entry.shape)}, "
                    f"config.json asks for {list(shape)}"
                )
            if not entry.dtype.is_floating_point:
                raise LoramError(
                    f"{entry.file}: tensor {name} has the type {entry.dtype.name}, "
                    "and weights are floating numbers",
                    "a quantized checkpoint cannot be pruned: use the original one",
                )
        for name in self.tensors:
            if name not in expected and not ignored(name):
                raise LoramError(
                    f"{self.tensors[name].file}: tensor {name} is not known to this model family",
                    "refused rather than dropped: the family's JSON file must name it",
                )


def _with_module_names(
    directory: Path, config: Mapping[str, Any], tensors: dict[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """Tensors under their modules' names, where published files of a family have others."""
    model_type = config.get("model_type")
    for family in families():
        if model_type in family.model_types:
            if family.stored_names:
                tensors = {_renamed(name, family): entry for name, entry in tensors.items()}
            if family.further_layers and isinstance(config.get("num_hidden_layers"), int):
                last = config["num_hidden_layers"] + (config.get(family.further_layers) or 1)
                further = tuple(map(family.layer_prefix, range(config["num_hidden_layers"], last)))
                tensors = {n: e for n, e in tensors.items() if not n.startswith(further)}
            if family.experts is not None and family.experts.mxfp4:
                tensors = with_float_experts(directory, tensors, family)
            if family.experts is not None:
                tensors = _with_stacked_experts(directory, tensors, family, family.experts)
    return tensors


def _renamed(name: str, family: Family) -> str:
    for stored, module in family.stored_names.items():
        if name.startswith(stored):
            return module + name.removeprefix(stored)
    return name


def _with_stacked_experts(
    directory: Path, tensors: Mapping[str, TensorEntry], family: Family, experts: Experts
) -> dict[str, TensorEntry]:
    """Tensors that files hold expert by expert, each as the one that the module has.

    Raises:
        LoramError: A part is missing, or of another shape or type than its neighbours.
    """
    found: dict[str, TensorEntry] = {}
    parts: dict[str, dict[tuple[int, int], TensorEntry]] = {}
    for name, entry in tensors.items():
        prefix, rest = family.split_layer(name)
        part = experts.stored_at(rest) if rest else None
        if part is None:
            found[name] = entry
        elif part.index is None:
            rows = entry.shape[0] if entry.shape else 1
            moved = replace(entry, name=prefix + part.tensor, pieces=(Piece(name, rows),))
            found[moved.name] = moved
        else:
            # Its place is that of its first part.
            found.setdefault(prefix + part.tensor, entry)
            parts.setdefault(prefix + part.tensor, {})[part.index, part.place] = entry
    for name, stored in parts.items():
        prefix, rest = family.split_layer(name)
        templates = [prefix + template for template in experts.stored[rest]]
        found[name] = _stacked(directory, name, templates, stored)
    return found


def _stacked(
    directory: Path,
    name: str,
    templates: Sequence[str],
    stored: Mapping[tuple[int, int], TensorEntry],
) -> TensorEntry:
    """One tensor of the parts of all experts."""
    count = max(index for index, _ in stored) + 1
    for place, template in enumerate(templates):
        for index in range(count):
            if (index, place) not in stored:
                absent = template.replace("*", str(index))
                raise LoramError(f"{directory}: tensor {absent} is missing from the weights")
            entry, first = stored[index, place], stored[0, place]
            alike = entry.shape == first.shape and entry.dtype == stored[0, 0].dtype
            if not alike or len(entry.shape) != 2 or entry.shape[1] != stored[0, 0].shape[1]:
                raise LoramError(
                    f"{entry.file}: tensor {entry.name} has the type {entry.dtype.name} and shape "
                    f"{list(entry.shape)}, unlike those that it is stacked with"
                )
    first = stored[0, 0]
    pieces = tuple(Piece(t, stored[0, place].shape[0]) for place, t in enumerate(templates))
    return TensorEntry(
        name,
        first.dtype,
        (count, sum(piece.rows for piece in pieces), first.shape[1]),
        first.file,
        first.offset_bytes,
        pieces,
        tuple(tuple(stored[i, p] for p in range(len(templates))) for i in range(count)),
    )


def _with_weights(directory: Path, tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Decoder linears of few bits under shape and type of the weights that they stand for."""
    file = directory / "config.json"
    config = read_json(file) if file.is_file() else {}
    if CONFIG_KEY not in config:
        return tensors
    config = checked_config(config, str(file))
    low_bit, family = LowBit.of_config(config, str(file)), family_for(config, str(file))
    floating = [entry.dtype for entry in tensors.values() if entry.dtype.is_floating_point]
    if low_bit is None or not floating:
        return tensors
    shapes, packed = family.tensor_shapes(config), set(family.linear_names(config))
    return {
        name: as_weight(entry, shapes[name], low_bit, floating[0]) if name in packed else entry
        for name, entry in tensors.items()
    }


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed ``config.json``; of a multimodal model that we know, its text model's config.

    Of a model whose experts are read from MXFP4 it does not say so: to all that reads it, and in
    what is made of it, they are floating numbers.

    Raises:
        LoramError: It is absent, not JSON, or has widths or other values that cannot be.
    """
    file = directory / "config.json"
    return checked_config(read_json(file), str(file))


def checked_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A config, or its text model's, once its widths and other values are known to be sound.

    Raises:
        LoramError: See :func:`read_config`.
    """
    config = text_view(config)
    if takes_mxfp4(config):
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    check_widths(config, where)
    check_required(config, where)
    check_values(config, where)
    return config


def _weight_map(directory: Path) -> dict[str, str]:
    """Shard by tensor name from the index file; empty when the model is one file."""
    if not (directory / INDEX_NAME).is_file():
        if (directory / SINGLE_NAME).is_file():
            return {}
        if list(directory.glob("*.bin")) or list(directory.glob("*.pth")):
            raise LoramError(
                f"{directory}: only pickled weights (.bin, .pth), which are never loaded",
                "convert them to safetensors first",
            )
        raise LoramError(f"{directory}: no {SINGLE_NAME} and no {INDEX_NAME}")
    weight_map = read_json(directory / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoramError(f"{directory / INDEX_NAME}: no weight_map")
    for name, shard_name in weight_map.items():
        if not _is_plain_name(shard_name):
            raise LoramError(
                f"{directory / INDEX_NAME}: {name} lies outside the directory "
                f"({str(shard_name)[:60]!r})"
            )
    return weight_map


def _is_plain_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and "\0" not in name
        and name != ".."
        and Path(name).name == name
    )
