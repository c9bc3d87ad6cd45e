"""Several processes on one training: starting them, and what the first one sends to the others.

The launcher (``torchrun``, ``accelerate launch``) has started the processes; the first one locks,
writes and speaks, the others compute. With one process everything here does nothing.
"""

import os
from typing import Any

from loram_cli.runs.processes import is_main_process, local_device, process_count


def join_processes(device: str) -> None:
    """Connect this process with the others; NCCL on GPUs, gloo on a CPU."""
    if process_count() == 1:
        return
    import torch
    from accelerate import PartialState

    if device.startswith("cuda"):
        torch.cuda.set_device(local_device(device))
    # accelerate asks for it beside WORLD_SIZE when it is to run on a CPU.
    on_cpu = device == "cpu"
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    PartialState(cpu=on_cpu)


def share(value: Any) -> Any:
    """The first process's value, on every process."""
    if process_count() == 1:
        return value
    import torch.distributed

    held = [value if is_main_process() else None]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is set on any process; every process must ask."""
    if process_count() == 1:
        return flag
    import torch
    import torch.distributed

    device = "cpu" if torch.distributed.get_backend() == "gloo" else "cuda"
    flags = torch.tensor([int(flag)], device=device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags.item())


def wait_for_all() -> None:
    """Go on once every process is here."""
    share(None)


def leave_processes() -> None:
    """Part from the others at the end of a command."""
    if process_count() == 1:
        return
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
