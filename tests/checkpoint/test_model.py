import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_base
from helpers.variants import VARIANTS
from safetensors.torch import load_file, save_file

import loram_cli
from loram_cli.arch.spec import Family
from loram_cli.checkpoint.header import DTYPES
from loram_cli.checkpoint.index import SINGLE_NAME
from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.oddities import oddities
from loram_cli.errors import LoramError

WITHOUT_TORCH = (
    *(f"checkpoint.{n}" for n in ("header", "index", "sources", "identity", "widths", "model")),
    "lora.adapter",
)


@pytest.fixture
def changed(tmp_path: Path):
    """A base whose config and weights a test changes before it is opened."""
    base = make_base(tmp_path / "base")

    def change(config=None, tensors=None) -> Path:
        if config:
            file = base / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        if tensors:
            weights = {**load_file(base / SINGLE_NAME), **tensors}
            save_file({n: t for n, t in weights.items() if t is not None}, base / SINGLE_NAME)
        return base

    return change


def renamed(name: str, family: Family) -> str:
    """A stored name as its module has it."""
    for stored, module in family.stored_names.items():
        if name.startswith(stored):
            return module + name.removeprefix(stored)
    return name


def stacked(tensors: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """Tensors that the file holds expert by expert, as the module has them."""
    if family.experts is None:
        return tensors
    found: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[int, dict[int, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        prefix, rest = family.split_layer(name)
        part = family.experts.stored_at(rest)
        if part is None:
            found[name] = tensor
        elif part.index is None:
            found[prefix + part.tensor] = tensor
        else:
            experts = parts.setdefault(prefix + part.tensor, {})
            experts.setdefault(part.index, {})[part.place] = tensor
    for name, experts in parts.items():
        rows = [
            [expert[place] for place in sorted(expert)] for _, expert in sorted(experts.items())
        ]
        found[name] = torch.stack([torch.cat(expert) for expert in rows])
    return found


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_what_is_known_without_a_tensor(variant, tmp_path):
    model = Model.open(variant.save(tmp_path / "model"))
    family = model.family
    tensors = {
        renamed(name, family): tensor
        for name, tensor in load_file(model.directory / SINGLE_NAME).items()
    }
    tensors = stacked(tensors, family)
    assert variant.model_type in family.model_types
    assert dict(model.shapes) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert model.num_params == sum(math.prod(shape) for shape in model.shapes.values())
    assert model.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert model.num_layers == family.full_config(model.config)["num_hidden_layers"]
    assert model.dtype == DTYPES["F32"]
    head = tensors.get(f"{family.lm_head}.weight")
    assert model.tied_embeddings is (head is None or variant.stores_head)
    assert model.stored_head_params == (head.numel() if variant.stores_head else 0)
    # CWM's defaults are those of a longer context than the tests' models have.
    assert len(list(oddities(model))) == (
        variant.stores_head or variant.model_type in ("apertus", "cwm")
    )
    assert set(model.linear_names) <= set(tensors)
    layers = model.geometry.layers
    assert len(model.linear_names) == sum(len(family.layer_modules(layer)) for layer in layers)


def test_a_directory_is_opened_once(base, monkeypatch):
    model = Model.open(base)
    assert Model.of(model) is model
    assert Model.of(base).directory == base
    index, shapes, identity = model.index, model.shapes, model.identity
    monkeypatch.setattr("loram_cli.checkpoint.index.read_header", None)
    monkeypatch.setattr("loram_cli.checkpoint.model.identify", None)
    assert model.index is index and model.shapes is shapes and model.identity is identity


def test_the_weights_are_not_opened_with_the_config(changed):
    base = changed()
    (base / SINGLE_NAME).unlink()
    model = Model.open(base)
    assert model.num_layers == 4 and len(model.linear_names) == 28
    with pytest.raises(LoramError, match=r"no model\.safetensors and no"):
        _ = model.index


def test_a_config_of_no_known_family_is_refused_at_once(changed):
    with pytest.raises(LoramError, match="model_type 'gpt2' is not a known family"):
        Model.open(changed(config={"model_type": "gpt2"}))


def test_a_stored_head_of_a_tied_model_is_one_of_its_tensors(changed):
    model = Model.open(changed(config={"tie_word_embeddings": True}))
    assert model.tied_embeddings
    head, embedding = (f"{n}.weight" for n in (model.family.lm_head, model.family.embedding))
    assert model.shapes[head] == model.shapes[embedding]


def test_only_a_whole_model_passes(changed):
    model = Model.open(changed())
    model.check_whole()
    (model.directory / "tokenizer.json").unlink()
    with pytest.raises(LoramError, match="no tokenizer"):
        model.check_whole()
    model.check_whole(tokenizer=False)
    [norm] = model.family.norms
    with pytest.raises(LoramError, match=f"tensor {norm} is missing from the weights"):
        Model.open(changed(tensors={norm: None})).check_whole(tokenizer=False)


def test_identity_names_what_changed(changed):
    before = Model.open(changed()).identity.to_mapping()
    [norm] = Model.open(changed()).family.norms
    weight = load_file(changed() / SINGLE_NAME)[norm]
    after = Model.open(changed(tensors={norm: weight + 1})).identity.to_mapping()
    assert {part for part in before if before[part] != after[part]} == {"weights"}
    retyped = Model.open(changed(tensors={norm: weight.bfloat16()})).identity.to_mapping()
    assert {part for part in before if before[part] != retyped[part]} == {"tensors", "weights"}


def test_a_shard_that_shrinks_after_it_was_opened_has_no_identity(changed):
    model = Model.open(changed())
    model.check_whole()
    file = model.directory / SINGLE_NAME
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(LoramError, match="ends inside tensor"):
        _ = model.identity
    file.unlink()
    with pytest.raises(LoramError, match=r"model\.safetensors: cannot be read \(No such file"):
        _ = model.identity


def test_below_the_stages_models_are_opened_here_alone():
    root = Path(loram_cli.__file__).parent
    lower = "evaluation training modeling pruning memory demo lora checkpoint"
    found = {
        (file.relative_to(root).as_posix(), ast.unparse(node.func))
        for floor in lower.split()
        for file in (root / floor).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
    }
    calls = ("family_for", "read_config", "CheckpointIndex.open")
    assert {(file, call) for file, call in found if call in calls} == {
        *(("checkpoint/model.py", call) for call in calls),
        # Which tensors are of few bits.
        ("checkpoint/index.py", "family_for"),
    }


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_no_torch_is_imported(module, base):
    code = f"import sys, loram_cli.{module}; assert 'torch' not in sys.modules"
    if module == "checkpoint.model":
        code += (
            "; from pathlib import Path\n"
            f"model = loram_cli.{module}.Model.open(Path({str(base)!r}))\n"
            "model.check_whole()\n"
            "assert model.identity and 'torch' not in sys.modules"
        )
    subprocess.run([sys.executable, "-c", code], check=True)
