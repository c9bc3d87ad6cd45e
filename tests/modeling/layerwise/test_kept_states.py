import os

import pytest
import torch

from loram_cli.errors import LoramError
from loram_cli.modeling.layerwise.kept_states import KeptStates

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["device", "host", "file"])
def test_what_is_put_comes_back_whatever_its_shape(tmp_path, dtype, place):
    kept = KeptStates(tmp_path if place == "file" else place, CPU)
    tensors = {(b, m): torch.randn(2, 3 + m, 8).to(dtype) for b in range(3) for m in range(4)}
    for step in range(2):
        for key, tensor in tensors.items():
            kept.put(*key, tensor + step)
        for key, tensor in tensors.items():
            assert torch.equal(kept.take(*key, keep=True), tensor + step)
        # Another one in its place, longer than it.
        kept.put(1, 2, torch.ones(2, 9, 8, dtype=dtype))
        assert torch.equal(kept.take(1, 2), torch.ones(2, 9, 8, dtype=dtype))
        assert torch.equal(kept.take(2, 3), tensors[2, 3] + step)
        kept.clear()
    kept.close()


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    kept = KeptStates(tmp_path, CPU)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(LoramError, match="cannot be kept on disk") as caught:
        kept.put(0, 0, torch.ones(4))
    assert "--batch" in caught.value.hint
    kept.close()
