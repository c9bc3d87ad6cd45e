"""What a GPU is asked for by copies, on a stand-in for torch.cuda."""

import torch

from loram_cli.modeling.copies import CudaCopies


class FakeCuda:
    """torch.cuda as far as copies use it: who waits for whom."""

    def __init__(self, told):
        self.told, self.streams = told, 0

    def Stream(self, device):
        return FakeStream(self.told, "copies")

    def current_stream(self, device):
        return FakeStream(self.told, "computing")

    def stream(self, stream):
        self.told.append(("enter", stream.name))
        return torch.no_grad()

    def cudart(self):
        return self

    def cudaHostRegister(self, place, num_bytes, flags):
        self.told.append(("pin", num_bytes))
        return 0 if num_bytes < 100 else 2

    def cudaHostUnregister(self, place):
        self.told.append(("unpin",))


class FakeStream:
    def __init__(self, told, name):
        self.told, self.name = told, name

    def record_event(self):
        return f"event of {self.name}"

    def wait_event(self, event):
        self.told.append((self.name, "waits for", event))

    def synchronize(self):
        self.told.append((self.name, "is finished"))


def test_copies_and_computation_wait_for_each_other_on_a_gpu(monkeypatch):
    told = []
    monkeypatch.setattr("loram_cli.modeling.copies.torch.cuda", FakeCuda(told))
    copies = CudaCopies("cuda")
    assert copies.pin(torch.zeros(4)) and not copies.pin(torch.zeros(100))
    with copies.stream(copies.computed()):
        done = copies.copied()
    copies.wait(done)
    copies.finish()
    copies.unpin(torch.zeros(4))
    assert told == [
        ("pin", 16), ("pin", 400),
        ("copies", "waits for", "event of computing"), ("enter", "copies"),
        ("computing", "waits for", "event of copies"), ("copies", "is finished"),
        ("computing", "is finished"), ("unpin",),
    ]  # fmt: skip
