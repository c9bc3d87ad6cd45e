"""How the examples of a forward pass lie side by side: padded, or several in a row, kept apart.

Where a row holds several examples, positions begin anew with each of them. transformers tells from
these positions which tokens belong together (``masking_utils.find_packed_sequence_indices``): it
makes a block-diagonal mask of them, and of a single row lengths for flash attention's kernel of
variable lengths. No example sees another one, and the loss is the padded one's to rounding.
"""

from collections.abc import Sequence

import numpy as np
import torch

from loram_cli.arch.spec import Family
from loram_cli.errors import UsageError
from loram_cli.memory.setup import MOST_PADDING, Packing
from loram_cli.training.data.tokens import IGNORED_LABEL, PadCollator, TokenRow

# Places of examples, row by row.
Layout = list[list[int]]


def arranged(lengths: Sequence[int], packing: Packing, *, multiple: int = 1) -> Layout:
    """Which examples share a row.

    ``off`` gives each a row of its own, ``on`` puts all into one. ``auto`` takes the most rows
    whose padding stays within :data:`MOST_PADDING`: rows are short then, and so is attention.
    Examples go to the shortest row so far, the longest ones first (Graham's LPT rule).

    Args:
        lengths: Tokens of each example.
        packing: Which of the three.
        multiple: Rows are padded to a multiple of it.
    """
    every = list(range(len(lengths)))
    if packing == "on":
        return [every]
    alone = [[place] for place in every]
    if packing == "off":
        return alone
    most = MOST_PADDING * sum(lengths)
    falling = sorted(every, key=lambda place: -lengths[place])
    for rows in range(len(lengths), 1, -1):
        found = alone if rows == len(lengths) else _longest_first(falling, lengths, rows)
        if padded_tokens(found, lengths, multiple=multiple) <= most:
            return found
    return [every]


def padded_tokens(layout: Layout, lengths: Sequence[int], *, multiple: int = 1) -> int:
    """Tokens that a layout makes the model compute, padding included."""
    longest = max(sum(lengths[place] for place in row) for row in layout)
    return len(layout) * -(-longest // multiple) * multiple


def usable_packing(asked: Packing, family: Family, attention: str) -> Packing:
    """The packing that a model supports: ``auto`` takes the cheapest pass.

    Args:
        asked: By the user.
        family: Of the model; some mix what shares a row, since a state runs through it.
        attention: The kernel. Flash attention's takes lengths of any kind in one row for nothing;
            the others would pay for a row's length squared.

    Raises:
        UsageError: Rows are to be shared, and the family cannot keep examples apart.
    """
    if family.packs:
        return "on" if asked == "auto" and "flash" in attention else asked
    if asked == "on":
        raise UsageError(
            f"--packing on: models of the family {family.family} do not keep examples apart that "
            "share a row",
            "pass --packing auto, which brings examples of like length together",
        )
    return "off"


class PackCollator(PadCollator):
    """Lays rows out as ``packing`` says, into int64 tensors of shape (rows, longest).

    Args:
        pad_token_id: Any valid id.
        multiple: Rows are padded to a multiple of it.
        packing: See :func:`arranged`.
    """

    def __init__(self, pad_token_id: int, multiple: int = 1, packing: Packing = "auto") -> None:
        super().__init__(pad_token_id, multiple)
        self.packing = packing

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``labels``, and where a row holds several ``position_ids``."""
        layout = arranged(
            [len(row.input_ids) for row in rows], self.packing, multiple=self.multiple
        )
        if len(layout) == len(rows):
            return super().__call__(rows)
        shared = [_joined([rows[place] for place in row]) for row in layout]
        width = -(-max(len(ids) for ids, _, _ in shared) // self.multiple) * self.multiple
        ids = np.full((len(shared), width), self.pad, np.int64)
        labels = np.full(ids.shape, IGNORED_LABEL, np.int64)
        # What is left of a row is a sequence of its own, which nothing attends to.
        positions = np.zeros(ids.shape, np.int64)
        for i, (some_ids, some_labels, some_positions) in enumerate(shared):
            length = len(some_ids)
            ids[i, :length], labels[i, :length] = some_ids, some_labels
            positions[i, :length] = some_positions
            positions[i, length:] = np.arange(width - length)
        arrays = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _joined(rows: Sequence[TokenRow]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels and positions of examples that share a row."""
    labels = [row.labels() for row in rows]
    for some in labels:
        # What precedes it is another example's end.
        some[:1] = IGNORED_LABEL
    return (
        np.concatenate([row.input_ids for row in rows]),
        np.concatenate(labels),
        np.concatenate([np.arange(len(row.input_ids)) for row in rows]),
    )


def _longest_first(falling: Sequence[int], lengths: Sequence[int], rows: int) -> Layout:
    layout: Layout = [[] for _ in range(rows)]
    filled = [0] * rows
    for place in falling:
        shortest = filled.index(min(filled))
        layout[shortest].append(place)
        filled[shortest] += lengths[place]
    return layout
