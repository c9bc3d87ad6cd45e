"""Run under torchrun: a model that is shared out beside the same one whole, for each directory.

Prints one JSON object: per directory and way of training the largest difference of loss and of any
gradient, and the share of all weights that a process holds.
"""

import json
import sys
from pathlib import Path

import torch

from helpers.nf4 import nf4_model
from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.index import read_config
from loram_cli.modeling.load import load_causal_lm
from loram_cli.modeling.sharding import SharedModel, is_shared, release_gathered, whole
from loram_cli.reporting import NullReporter
from loram_cli.runs.processes import is_main_process
from loram_cli.training.adapters import attach_lora, lora_config, lora_targets
from loram_cli.training.distributed import join_processes, leave_processes

HOW = {"dtype": torch.float32, "device": "cpu"}


def adapted(model, directory):
    config = read_config(directory)
    family = family_for(config, "")
    tied = family.geometry(config).tied_embeddings
    targets = lora_targets(family, tied_embeddings=tied, reporter=NullReporter())
    return attach_lora(model, lora_config(targets, dropout=0), seed=1)


def models(directory, way):
    """The model whole, and shared out."""
    nf4 = way == "nf4"
    shared = SharedModel(directory, nf4=nf4, **HOW)
    if way == "all":
        shared.load(shared.model, NullReporter())
        return load_causal_lm(directory, **HOW), shared.model
    mine = adapted(shared.model, directory)
    shared.load(mine, NullReporter())
    if nf4:
        return nf4_model(directory, lambda plain: adapted(plain, directory)), mine
    return adapted(load_causal_lm(directory, **HOW).requires_grad_(False), directory), mine


def compare(directory, way):
    plain, mine = models(directory, way)
    assert is_shared(mine)
    assert not is_shared(plain)
    if way == "all":
        for model in (plain, mine):
            model.requires_grad_(True)
            model.get_output_embeddings().requires_grad_(False)
    ids = torch.randint(2, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    worst = 0.0
    # Also without gradients before and after, as an evaluation does.
    for _ in range(2):
        losses = []
        for model in (plain, mine):
            with torch.no_grad():
                losses.append(model(input_ids=ids, labels=ids).loss.item())
            release_gathered(model)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
        worst = max(worst, *(abs(loss - losses[0]) for loss in losses))
        # None: what only chooses experts (the bias of a router) has no gradient.
        gradients = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        names = [n for n, p in mine.named_parameters() if p.grad is not None]
        assert names == list(gradients), set(names) ^ set(gradients)
        assert names
        for name, parameter in mine.named_parameters():
            if parameter.grad is not None:
                difference = (whole(parameter.grad) - gradients[name]).abs().max().item()
                worst = max(worst, difference)
    held = sum(p.to_local().numel() for p in mine.parameters())
    return worst, held / sum(p.numel() for p in mine.parameters())


def main():
    join_processes("cpu")
    told = {
        f"{Path(word).name} {way}": compare(Path(word), way)
        for word in sys.argv[1:]
        for way in ("lora", "nf4", "all")
    }
    if is_main_process():
        sys.stdout.write(json.dumps(told))
    leave_processes()


if __name__ == "__main__":
    main()
