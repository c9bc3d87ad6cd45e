"""The trainer of a model that several processes share out, see :mod:`..modeling.sharding`.

transformers' Trainer does FSDP through accelerate, which has none for CPUs, and otherwise takes a
model that is sliced already only without checkpoints to resume from. What it needs beyond that is
here: the norm of sliced gradients, and checkpoints that each process writes its slices of, in the
form of torch's distributed checkpoints.
"""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from loram_cli.modeling.sharding import release_gathered
from loram_cli.runs.processes import is_main_process
from loram_cli.training.loop.trainer import StepTrainer

_SLICES = "slices"
_SCHEDULER = "scheduler.pt"


class SharedTrainer(StepTrainer):
    """A trainer that leaves the model as it is sliced, and keeps the slices in checkpoints."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Then the trainer neither wraps the model nor moves it. Set this late, because the
        # parent's constructor refuses to write checkpoints of such a model.
        self.is_distributed_loading_by_transformers = True

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the parent; weights that stay whole for a backward pass are given up afterwards."""
        metrics = super().evaluate(*args, **kwargs)
        release_gathered(self.model)
        return metrics

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        torch.nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """The weights go with the optimizer's state."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        path = Path(output_dir)
        if is_main_process():
            path.mkdir(parents=True, exist_ok=True)
            torch.save(self.lr_scheduler.state_dict(), path / _SCHEDULER)
        save(
            {"weights": self._trained(), "optimizer": self._moments()}, checkpoint_id=path / _SLICES
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Each slice is filled where it lies.
        load({"weights": self._trained()}, checkpoint_id=Path(resume_from_checkpoint) / _SLICES)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint)
        load({"optimizer": self._moments()}, checkpoint_id=path / _SLICES)
        self.lr_scheduler.load_state_dict(torch.load(path / _SCHEDULER, weights_only=True))
        rates = self.lr_scheduler.get_last_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _trained(self) -> dict[str, torch.Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    def _moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """AdamW's state by parameter name; zeros before the first step, as AdamW begins."""
        state = self.optimizer.state
        for parameter in (p for p in self.model.parameters() if p.requires_grad):
            if not state[parameter]:
                state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter.detach()),
                    "exp_avg_sq": torch.zeros_like(parameter.detach()),
                }
        return {n: state[p] for n, p in self.model.named_parameters() if p.requires_grad}
