"""Files read and written past the page cache.

A checkpoint is read and written once, from start to end. Through the page cache each byte is
copied once more and takes a page that somebody else could use; on virtual machines, whose host
gives pages at first touch, that costs more than all the arithmetic here. Unbuffered transfers
want addresses, offsets and counts in whole blocks, which is what these helpers look after.
"""

import ctypes
import fcntl
import mmap
import os
import resource
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import torch

from loram_cli.units import MIB

# A multiple of every disk's logical block, and a page.
BLOCK_BYTES = 4096
_LARGE_PAGE_BYTES = 2 * MIB
# Below this a file is not worth the trouble: the page cache has it at once, and keeps it.
LEAST_BYTES = 64 * MIB
# As a container sees its own, in the second and the first version of control groups.
_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def block_floor(offset_bytes: int) -> int:
    """The start of the block that a byte is in."""
    return offset_bytes // BLOCK_BYTES * BLOCK_BYTES


def block_ceiling(offset_bytes: int) -> int:
    """The end of the blocks that so many bytes take."""
    return block_floor(offset_bytes + BLOCK_BYTES - 1)


def block_buffer(count_bytes: int) -> torch.Tensor:
    """Memory at a block's address; much of it, in large pages where the system has them.

    A disk is asked for a piece in as many requests as its memory has separate stretches; with
    pages of 4 KiB those can be dozens.

    Args:
        count_bytes: At least this many; rounded up to whole blocks.

    Returns:
        uint8, shape (whole blocks,).
    """
    if count_bytes >= _LARGE_PAGE_BYTES:
        return torch.from_numpy(_aligned(_anonymous(count_bytes), count_bytes))
    wider = torch.empty(block_ceiling(count_bytes) + BLOCK_BYTES, dtype=torch.uint8)
    start = -wider.data_ptr() % BLOCK_BYTES
    return wider[start : start + block_ceiling(count_bytes)]


class BufferPool:
    """Buffers of one length, each lent until the last tensor on it is gone.

    Args:
        count_bytes: Length of a buffer; rounded up to whole blocks.
    """

    def __init__(self, count_bytes: int) -> None:
        self.count_bytes = block_ceiling(count_bytes)
        self._spare: list[mmap.mmap] = []

    def take(self) -> torch.Tensor:
        """Memory with anything in it, uint8, shape (count_bytes,)."""
        memory = self._spare.pop() if self._spare else _anonymous(self.count_bytes)
        array = _aligned(memory, self.count_bytes)
        # Views of the tensor share its storage, and only that holds the array.
        weakref.finalize(array, self._spare.append, memory).atexit = False
        return torch.from_numpy(array)


def _anonymous(count_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, count_bytes + _LARGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _aligned(memory: mmap.mmap, count_bytes: int) -> "numpy.ndarray[Any, Any]":
    whole = numpy.frombuffer(memory, dtype=numpy.uint8)
    start = -whole.ctypes.data % _LARGE_PAGE_BYTES
    return whole[start : start + block_ceiling(count_bytes)]


def stop_buffering(descriptor: int) -> bool:
    """Have an open file's transfers go past the page cache from now on.

    Returns:
        False where the system or the file system has no such thing; nothing is changed then.
    """
    if not hasattr(os, "O_DIRECT"):
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            # Some file systems take the flag, and refuse the transfer.
            os.preadv(descriptor, [block_buffer(BLOCK_BYTES).numpy().data], 0)
    except OSError:
        buffer_again(descriptor)
        return False
    return True


def buffer_again(descriptor: int) -> None:
    """Undo :func:`stop_buffering`, e.g. for a last part that fills no block."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def is_cached(descriptor: int) -> bool:
    """Whether most of a file is in the page cache already."""
    libc = ctypes.CDLL(None)
    count_bytes = os.fstat(descriptor).st_size
    if not count_bytes or not hasattr(libc, "mincore"):
        return False
    resident = numpy.zeros(-(-count_bytes // mmap.PAGESIZE), dtype=numpy.uint8)
    with mmap.mmap(descriptor, count_bytes, prot=mmap.PROT_READ) as view:
        mapped = numpy.frombuffer(view, dtype=numpy.uint8)
        failed = libc.mincore(
            ctypes.c_void_p(mapped.ctypes.data),
            ctypes.c_size_t(count_bytes),
            ctypes.c_void_p(resident.ctypes.data),
        )
        del mapped
    return not failed and int((resident & 1).sum()) * 2 > resident.size


def exceeds_cache(count_bytes: int) -> bool:
    """Whether so many bytes would push everything else out of the page cache.

    Caching a file larger than the memory gains nothing when it is read from start to end: its
    beginning is gone when it would be read again.
    """
    return count_bytes * 2 > usable_memory_bytes()


def usable_memory_bytes() -> int:
    """The machine's memory, or what this process may have of it where that is less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    found += [limit for limit in limits if limit != resource.RLIM_INFINITY]
    for file in _CGROUP_LIMITS:
        try:
            found.append(int(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return min(found)
