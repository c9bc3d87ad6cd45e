"""What a module of a Hugging Face model is called in a GGUF file, and how its rows lie there."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from loram_cli.arch.registry import families
from loram_cli.arch.spec import Family, GgufFacts
from loram_cli.errors import LoramError
from loram_cli.lora.adapter import LoraPair

HEAD = "output.weight"
EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class LayerHeads:
    """How many heads one layer's queries and its keys have."""

    query: int
    key_value: int


@dataclass(frozen=True)
class GgufNames:
    """A model's tensors by the names of both worlds.

    Attributes:
        family: Of the model.
        heads: Of each layer.
    """

    family: Family
    heads: tuple[LayerHeads, ...]

    def tensor(self, module: str) -> str:
        """The name of a module's weight in a GGUF file.

        Args:
            module: Such as ``model.layers.3.self_attn.q_proj``.

        Raises:
            LoramError: The architecture has no such tensor.
        """
        found = self.family.module_named(module)
        is_known = module == self.family.lm_head or (
            found is not None and found[0] < len(self.heads)
        )
        name = self._names.get_name(f"{module}.weight", (".weight",)) if is_known else None
        if name is None:
            raise LoramError(
                f"adapter module {module}: no such tensor in GGUF's architecture "
                f"'{gguf_facts(self.family).architecture}' with {len(self.heads)} layers",
                "export an adapter that was made for this model",
            )
        return name

    def reordered(self, module: str, pair: LoraPair) -> LoraPair:
        """The factors of a module, with ``lora_B``'s rows as GGUF orders them."""
        found, facts = self.family.module_named(module), gguf_facts(self.family)
        if found is None:
            return pair
        layer, linear = found
        heads = [getattr(self.heads[layer], part, 0) for part in linear.rows]
        rows = pair.lora_b.shape[0]
        if linear.name in facts.rotary_permuted:
            _check_heads(module, rows, heads[0], even=True)
            order = rotary_order(rows, heads[0])
        elif linear.name in facts.made_contiguous:
            _check_heads(module, rows, sum(heads))
            order = contiguous_order(rows, heads)
        else:
            return pair
        return LoraPair(pair.lora_a, pair.lora_b[order])

    @cached_property
    def _names(self) -> TensorNameMap:
        names = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
        return get_tensor_name_map(names[gguf_facts(self.family).architecture], len(self.heads))


def rotary_order(rows: int, heads: int) -> torch.Tensor:
    """Which row of a Hugging Face weight each row of a GGUF weight is.

    transformers rotates row ``i`` of a head with row ``i + width / 2``; llama.cpp's ``llama``
    architecture rotates rows ``2 i`` and ``2 i + 1``. Source: ``LlamaModel.permute`` in
    llama.cpp's ``convert_hf_to_gguf.py``.

    Args:
        rows: Of the weight.
        heads: How many heads these are.

    Returns:
        Indices, shape (rows,): ``gguf = huggingface[rotary_order(rows, heads)]``.
    """
    return torch.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def contiguous_order(rows: int, heads: Sequence[int]) -> torch.Tensor:
    """Which row of a fused Hugging Face weight each row of a GGUF weight is.

    A checkpoint holds, per key/value head, its query heads, its key and its value; GGUF holds all
    queries, then all keys, then all values. Source: ``FalconModel.modify_tensors`` and
    ``GPTNeoXModel.modify_tensors`` in llama.cpp's converter.

    Args:
        rows: Of the weight.
        heads: How many heads each part has, queries first; all but these have one a group.

    Returns:
        Indices, shape (rows,): ``gguf = huggingface[contiguous_order(rows, heads)]``.
    """
    groups = heads[-1]
    grouped = torch.arange(rows).reshape(groups, -1, rows // sum(heads))
    parts = grouped.split([count // groups for count in heads], dim=1)
    return torch.cat([part.reshape(-1) for part in parts])


def _check_heads(module: str, rows: int, heads: int, *, even: bool = False) -> None:
    if rows % (heads * (2 if even else 1)):
        raise LoramError(
            f"adapter module {module}: {rows} rows do not make {heads} heads"
            f"{' of even width' if even else ''}",
            "export an adapter that was made for this model",
        )


def gguf_facts(family: Family) -> GgufFacts:
    """How the family's GGUF files differ.

    Raises:
        LoramError: The family's file does not say.
    """
    if family.gguf is None:
        raise LoramError(
            f"family '{family.family}' is not known in GGUF files",
            f'add the key "gguf" to loram_cli/arch/families/{family.family}.json',
        )
    return family.gguf


def family_for_gguf(architecture: str, where: str) -> Family:
    """A family whose GGUF files state this architecture.

    Families that share one, as Llama and Mistral do, also share what their files say of GGUF.

    Args:
        architecture: The value of ``general.architecture``.
        where: What to name in the error.

    Raises:
        LoramError: No family does.
    """
    known = {f.gguf.architecture: f for f in families() if f.gguf is not None}
    if architecture not in known:
        raise LoramError(
            f"{where}: architecture '{architecture}' is not a known family "
            f"(known: {', '.join(sorted(known))})",
            "a family is one JSON file in loram_cli/arch/families/",
        )
    return known[architecture]
