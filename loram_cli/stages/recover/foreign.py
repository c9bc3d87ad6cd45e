"""Adapters that another trainer made: plain LoRA by PEFT on a pruned or aligned directory."""

from pathlib import Path

import torch
from safetensors import safe_open as safetensors_file

from loram_cli.checkpoint.identity import chat_template_digest
from loram_cli.checkpoint.json_files import read_json
from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.errors import LoramError, UsageError
from loram_cli.lora.adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    model_copies,
    read_adapter_config,
    read_shapes,
)
from loram_cli.modeling.load import loading
from loram_cli.quiet import quiet_libraries
from loram_cli.runs.digests import file_digest
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.stages.core.lineage import check_base, model_record
from loram_cli.stages.core.plan import check_out_of_tree
from loram_cli.stages.recover.spec import RecoverSpec
from loram_cli.stages.recover.work import RecoverWork

# What tells that a model, and not its adapter, was changed when the factors were initialized.
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_foreign(adapter: Path) -> bool:
    """Whether a directory is an adapter that is no output of ours."""
    return (adapter / CONFIG_NAME).is_file() and not (adapter / MANIFEST_NAME).is_file()


def no_record(adapter: Path) -> LoramError:
    """The refusal of an adapter by another trainer where it is not told what it was trained on."""
    named = str(read_json(adapter / CONFIG_NAME).get("base_model_name_or_path"))
    directory = named if (Path(named) / MANIFEST_NAME).is_file() else "DIR"
    return LoramError(
        f"{adapter}: no record of what it was trained on ({MANIFEST_NAME} is absent)",
        f"for an adapter by another trainer add --pruned {directory}: the pruned or aligned "
        "directory that it was trained on",
    )


def open_foreign(spec: RecoverSpec) -> RecoverWork:
    """Open base, pruned directory and adapter, and see that they belong together.

    Raises:
        LoramError: They do not, a module has factors without being targeted or is targeted
            without having them, or the adapter is more than plain LoRA.
        UsageError: The adapter is one of ours and knows what it was trained on.
    """
    assert spec.pruned is not None
    check_out_of_tree(spec.out, spec.model, spec.adapter, spec.pruned)
    if (spec.adapter / MANIFEST_NAME).is_file():
        raise UsageError(
            f"--pruned: {spec.adapter} has its own record of what it was trained on",
            "leave --pruned out",
        )
    manifest = Manifest.read(spec.pruned)
    if manifest.stage not in ("prune", "align"):
        raise LoramError(
            f"{spec.pruned}: was made by '{manifest.stage}', expected an output of 'prune' or "
            "'align'"
        )
    model, small = Model.open(spec.model), Model.open(spec.pruned)
    base = check_base(manifest, model, spec.pruned)
    copies = check_copies(spec.adapter, small)
    check_factors(spec.adapter, small, copies)
    inputs = {
        "base": base,
        "pruned": {**model_record(small), "key": manifest.key},
        "adapter": {
            "path": str(spec.adapter),
            "weights": file_digest(spec.adapter / WEIGHTS_NAME),
            "config": file_digest(spec.adapter / CONFIG_NAME),
        },
    }
    template = chat_template_digest(spec.adapter)
    trained = inputs["pruned"] if template == "none" else {
        "path": str(spec.adapter), "chat_template": template
    }  # fmt: skip
    return RecoverWork(model, manifest, inputs, spec.adapter, trained, copies)


def check_copies(adapter: Path, small: Model) -> frozenset[str]:
    """Tensors that PEFT copied from the model, beside the factors of its output head.

    Raises:
        LoramError: One is not the model's own: it was trained, or the vocabulary resized.
    """
    file, copies = adapter / WEIGHTS_NAME, model_copies(adapter)
    index = small.index
    tied = {f"{small.family.lm_head}.weight": f"{small.family.embedding}.weight"}
    with safetensors_file(file, "pt") as saved, TensorReader(index) as reader:
        for name, own in copies.items():
            place = own if own in index.tensors else tied.get(own, own)
            same = place in index.tensors and torch.equal(
                saved.get_tensor(name), reader.read(place).to(saved.get_tensor(name).dtype)
            )
            if not same:
                raise LoramError(
                    f"{file}: tensor {name} is neither a LoRA factor nor a weight of "
                    f"{small.directory}",
                    "train LoRA factors only: no other weight, and no new tokens",
                )
    return frozenset(copies)


def check_factors(adapter: Path, small: Model, copies: frozenset[str]) -> None:
    """See that the factors and the targeted modules of a model are the same, one to one.

    Raises:
        LoramError: They are not, which PEFT would only warn of; or the model's own weights were
            changed when the factors were initialized.
    """
    file = adapter / CONFIG_NAME
    config = read_adapter_config(adapter)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_RESIDUAL):
        raise LoramError(
            f"{file}: init_lora_weights is {start!r}, which changes the model's own weights too",
            "train the adapter with PEFT's default initialization",
        )
    family = small.family
    linears = {name.removesuffix(".weight") for name in small.linear_names}
    if not small.tied_embeddings:
        linears.add(family.lm_head)
    having = set(read_shapes(adapter, copies))
    missing = sorted(_targeted(adapter, linears, family.lm_head) - having)
    unknown = sorted(having - linears - {family.lm_head})
    for names, fault in (
        (unknown, f"has factors for {{}}, and {small.directory} has no such module"),
        (missing, f"has no factors for {{}}, which {CONFIG_NAME} targets"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise LoramError(
                f"{adapter / WEIGHTS_NAME}: {fault.format(names[0] + more)}",
                "pass the directory that the adapter was trained on as --pruned",
            )


def _targeted(adapter: Path, linears: set[str], head: str) -> set[str]:
    """The modules that PEFT would give factors."""
    with loading(adapter / CONFIG_NAME, "PEFT"), quiet_libraries():
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        config = LoraConfig.from_pretrained(str(adapter))
        if config.target_modules == "all-linear":
            return linears - {head}
        return {name for name in linears if check_target_module_exists(config, name)}
