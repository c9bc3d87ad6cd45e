"""Counts what a computation really holds: tensors that autograd saves, and storage alive at a time."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SavedTensors:
    """A context that adds up the storage of all tensors that autograd saves, weights aside."""

    def __init__(self, model):
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._storages = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            # Held here, so that its address is not given to another one.
            self._storages[storage.data_ptr()] = storage
        return tensor

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    @property
    def num_bytes(self):
        return sum(storage.nbytes() for storage in self._storages.values())


class LiveStorage(TorchDispatchMode):
    """Bytes of storage that operations have made and that are still alive, and their highest mark."""

    def __init__(self, *known):
        super().__init__()
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, num_bytes)

    def _gone(self, key, num_bytes):
        self._seen.discard(key)
        self.live -= num_bytes
