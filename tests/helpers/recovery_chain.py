"""From a pruned directory through training, recovery and merging, and what must hold there."""

import functools
from pathlib import Path

import torch

from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.index import read_config
from loram_cli.modeling.load import load_causal_lm
from loram_cli.pruning.groups import LayerKeep
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.recover import merge
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.train import stage as train
from loram_cli.training.adapters import load_adapter

SILENT = NullReporter()
# Longer than the sliding windows of the tiny models, and two rows that differ.
IDS = torch.arange(2, 50).reshape(2, 24)
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def keep_of(directory: Path) -> dict[int, LayerKeep]:
    return {int(i): LayerKeep.from_mapping(k) for i, k in Manifest.read(directory).keep.items()}


def base_with_groups_zeroed(base: Path, keep: dict[int, LayerKeep]):
    """The base, where nothing reads what the dropped heads and channels compute."""
    model = load_causal_lm(base, device="cpu")
    config = read_config(base)
    family = family_for(config, "base")
    geometry = family.geometry(config)
    for i, kept in keep.items():
        for module in family.layer_modules(geometry.layers[i]):
            columns = kept.columns(module, geometry.layers[i])
            if columns is not None:
                weight = model.get_parameter(f"{family.layer_prefix(i)}{module.name}.weight")
                dropped = sorted(set(range(weight.shape[1])) - set(columns))
                weight.data[:, dropped] = 0
        if kept.experts is not None:
            block = family.experts.module.rpartition(".")[0]
            layer = model.get_submodule(family.layers)[i].get_submodule(block)
            top_k = kept.widths(geometry.layers[i]).top_k
            _route_among(layer, torch.tensor(kept.experts), top_k)
    return model


def _route_among(block, kept: torch.Tensor, top_k: int) -> None:
    """Let a block's router see some of its experts only, which all stay where they are."""
    router = block.get_submodule("gate" if hasattr(block, "gate") else "router")
    count = next(router.parameters()).shape[0]
    for module in (block, *router.modules()):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and count in tensor.shape:
                    cut = tensor.data.index_select(tensor.shape.index(count), kept)
                    tensors[name] = (
                        torch.nn.Parameter(cut) if tensors is module._parameters else cut
                    )
    router.num_experts, router.top_k = len(kept), top_k
    router.register_forward_hook(lambda _, args, out: (*out[:2], kept[out[2]]))


def rescales(base: Path) -> bool:
    """Whether a norm runs over all heads together: with fewer of them it is another norm."""
    family = family_for(read_config(base), "base")
    return any(norm.shape[0] in ("query", "key_value") for norm in family.layer_norms)


def adapted(source: Path, out: Path, instructions: Path, targets: tuple[str, ...] = ()) -> None:
    spec = train.TrainSpec(
        source=source, out=out, data=str(instructions), steps=2, batch=2, micro_batch=2,
        learning_rate=2e-2, warmup_steps=0, max_length=48, eval_examples=2, eval_steps=2,
        device="cpu", targets=targets,
    )  # fmt: skip
    train.run(spec, SILENT)


def recovered_and_merged(run: Path, base: Path) -> None:
    places = {"adapter": run / "adapter", "model": base, "out": run / "recovered"}
    recover.run(recover.RecoverSpec(**places), SILENT)
    places = {"adapter": run / "recovered", "model": base, "out": run / "merged"}
    merge.run(merge.MergeSpec(**places), SILENT)


def check_training_and_recovery(
    run: Path, base: Path, instructions: Path, targets: tuple[str, ...] = ()
) -> None:
    """From ``run/pruned`` on: train, recover, merge, and compare with stock libraries."""
    keep = keep_of(run / "pruned")
    narrow = load_causal_lm(run / "pruned", device="cpu")
    exact = not rescales(base)
    if exact:
        close(logits(narrow), logits(base_with_groups_zeroed(base, keep)))

    adapted(run / "pruned", run / "adapter", instructions, targets)
    check_recovery(run, base)
    if not exact:
        return
    # Where only kept groups are read, the recovered adapter does what the small one does.
    small = logits(load_adapter(narrow, run / "adapter"))
    full = load_adapter(base_with_groups_zeroed(base, keep), run / "recovered")
    close(small, logits(full))


def check_recovery(run: Path, base: Path) -> None:
    """Recover and merge ``run/adapter``: stock PEFT, the merged model and our own path agree."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recovered_and_merged(run, base)
    plain = logits(AutoModelForCausalLM.from_pretrained(base).eval())
    close(plain, logits(load_causal_lm(base, device="cpu")))
    stock = AutoModelForCausalLM.from_pretrained(base)
    stock = logits(PeftModel.from_pretrained(stock, run / "recovered").eval())
    assert (stock - plain).abs().max() > 1e-3
    close(logits(AutoModelForCausalLM.from_pretrained(run / "merged").eval()), stock)
    close(logits(load_adapter(load_causal_lm(base, device="cpu"), run / "recovered")), stock)
