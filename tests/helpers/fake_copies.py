"""The streams and events of a GPU, of which only the rules are there.

Everything happens at once here, so a missing wait would change no number. Hence the books: which
memory each block of copies writes, whether a computation has waited for it before it reads, and
whether a block that overwrites memory waits for the computation that read it last.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(eq=False)
class Event:
    """What is known to be done once it has come: writes, or reads by memory and how many."""

    written: set[int] = field(default_factory=set)
    reads: dict[int, int] = field(default_factory=dict)


class FakeCopies:
    """Breaks no rule silently: :attr:`broken` says which.

    Args:
        pins: Whether memory can be pinned here.
    """

    def __init__(self, pins: bool = True) -> None:
        self._pins = pins
        self.pinned: set[int] = set()
        self.broken: list[str] = []
        self.blocks = 0
        self._ready: set[int] = set()
        self._reads: dict[int, int] = {}
        self._open: set[int] = set()
        self._finished = True
        self._lock = threading.Lock()

    def pin(self, host: torch.Tensor) -> bool:
        if self._pins:
            self.pinned.add(host.data_ptr())
        return self._pins

    def unpin(self, host: torch.Tensor) -> None:
        self._check(self._finished, "unpinned while copies may be under way")
        self.pinned.remove(host.data_ptr())

    def computed(self) -> Event:
        with self._lock:
            return Event(reads=dict(self._reads))

    @contextmanager
    def stream(self, after: Event | None) -> Iterator[None]:
        self._finished = False
        self.blocks += 1
        with _Writes() as writes:
            self._open = writes.found
            yield
        with self._lock:
            for memory in writes.found:
                uses = self._reads.get(memory, 0)
                known = after.reads.get(memory, 0) if after is not None else 0
                self._check(known == uses, "overwritten while a layer may still read it")
                self._ready.discard(memory)

    def copied(self) -> Event:
        return Event(written=self._open)

    def wait(self, event: Event) -> None:
        with self._lock:
            self._ready |= event.written

    def finish(self) -> None:
        self._finished = True

    def reading(self, tensor: torch.Tensor) -> None:
        """A computation reads this weight now."""
        memory = tensor.untyped_storage().data_ptr()
        with self._lock:
            self._reads[memory] = self._reads.get(memory, 0) + 1
        self._check(memory in self._ready, "read before its copy is known to be done")

    def _check(self, kept: bool, rule: str) -> None:
        if not kept:
            self.broken.append(rule)


def watched_by(copies: FakeCopies, skeleton: Any, stay: int) -> None:
    """Every layer that is brought tells which weights it reads."""

    def tell(slots: Any, *_: Any) -> None:
        for slot in slots:
            for module, kind in slot.places:
                copies.reading(module._parameters[kind])

    for layer, slots in list(skeleton.layers())[stay:]:
        layer.register_forward_pre_hook(partial(tell, slots))


class _Writes(TorchDispatchMode):
    """The memory that copies write into, on this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].device.type != "meta":
            self.found.add(args[0].untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))
