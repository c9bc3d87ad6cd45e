"""Train the tables of values of trellis codes, and tell what Gaussian numbers lose by them.

As Lloyd's method trains the values of a quantizer: numbers are drawn, the best codes found, and
each value moves to the mean of the numbers that took it. Run it from the repository's root:
``python tests/benchmarks/trellis_tables.py`` tells the loss of the tables in use beside that of the
best values of one's own choice (Lloyd and Max, 1960); ``--write`` trains them anew, in two minutes.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from loram_cli.checkpoint.trellis import WINDOW, table
from loram_cli.pruning.trellis import best_codes

_FILE = Path("loram_cli/checkpoint/trellis.json")
# Squared error of unit Gaussian numbers with the best 4, 8 and 16 values.
_OWN_CHOICE = {2: 0.1175, 3: 0.03454, 4: 0.009497}
_LENGTH, _SEQUENCES, _ROUNDS, _SEEDS = 64, 600, 60, 6
# Numbers that each value is held by, in the first half of the rounds and in the second.
_HELD_BY = (2, 60)


def places(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Places in the table, shape as the codes': (sequences, length)."""
    found = torch.zeros(codes.shape, dtype=torch.long)
    for before in range(WINDOW[bits]):
        found[:, before:] |= codes[:, : codes.shape[1] - before].long() << bits * before
    return found


def trained(bits: int, seed: int) -> torch.Tensor:
    """One table, from values in an order that is drawn."""
    generator = torch.Generator().manual_seed(seed)
    count = 2 ** (bits * WINDOW[bits])
    shares = 2 * (torch.arange(count, dtype=torch.float64) + 0.5) / count - 1
    values = (torch.erfinv(shares) * 2**0.5).float()[torch.randperm(count, generator=generator)]
    for turn in range(_ROUNDS):
        numbers = torch.randn(_SEQUENCES, _LENGTH, generator=generator)
        taken = places(best_codes(numbers, bits, values=values), bits).reshape(-1)
        held = _HELD_BY[turn >= _ROUNDS / 2]
        sums = torch.zeros(count).index_add_(0, taken, numbers.reshape(-1))
        values = (sums + held * values) / (torch.bincount(taken, minlength=count) + held)
    return values


def loss(bits: int, values: torch.Tensor) -> float:
    """Mean squared error of unit Gaussian numbers."""
    numbers = torch.randn(2000, _LENGTH, generator=torch.Generator().manual_seed(99))
    found = values[places(best_codes(numbers, bits, values=values), bits)]
    return float((found - numbers).square().mean())


def main(arguments: list[str]) -> None:
    """Tell the losses, and write the tables where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"train anew, and write {_FILE}")
    write = parser.parse_args(arguments).write
    tables = {}
    for bits in WINDOW:
        drawn = [trained(bits, seed) for seed in range(_SEEDS)] if write else [table(bits)]
        error, values = min(((loss(bits, t), t) for t in drawn), key=lambda pair: pair[0])
        tables[bits] = [round(float(value), 4) for value in values]
        sys.stdout.write(
            f"{bits} bits: {error:.4f}, {error / _OWN_CHOICE[bits]:.2f} of {_OWN_CHOICE[bits]}\n"
        )
    if write:
        _FILE.write_text(json.dumps(tables), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
