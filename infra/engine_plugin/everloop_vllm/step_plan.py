# SPDX-License-Identifier: Apache-2.0
"""How the rows of one step are laid out, so that each layer multiplies all adapters at once.

A step's mapping is the same for every layer, and mostly for many steps: what can be worked
out from it is worked out here, once. Shapes use T rows (tokens) and O output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from everloop_vllm.grouped_ops import RowPlan

MAX_PADDING = 2.0
"""Positions per row up to which groups are padded to one size and multiplied in one call."""


class Block(NamedTuple):
    """Positions that one batched product serves.

    Attributes
    ----------
    slots : tuple of int
        First adapter slot, and the one after the last; those in between may be unused.
    start, stop : int
        The positions, an equal number for each slot.
    """

    slots: tuple[int, int]
    start: int
    stop: int

    def of(self, values: Tensor) -> Tensor:
        """Return this block's positions of ``values`` as (slots, positions each, width)."""
        return values[self.start : self.stop].unflatten(0, (self.slots[1] - self.slots[0], -1))


class Buffers(NamedTuple):
    """A buffer with a row for each position, and its views.

    Making views anew in each layer would cost as much there as a small product.
    """

    padded: Tensor  # one row more than there are positions
    whole: Tensor
    parts: tuple[Tensor, ...]  # one for each block


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows of one step, at positions grouped by adapter slot.

    Attributes
    ----------
    size : int
        Rows T of the step, those of the base model included.
    used : tuple of int
        Slots that some row uses, ascending.
    rows : Tensor of int64
        The adapters' rows, ordered by slot.
    groups : Tensor of int64, shape (G, 3)
        For each slot in use: the slot, and where its rows start and stop in ``rows``.
    blocks : tuple of Block
        Batched products that serve all positions; empty if all rows are the base model's.
    gather : Tensor of int64 or None
        Row at each position (any row, where a position only pads its group). None if
        rows and positions are the same, as when one adapter has every row.
    scatter : Tensor of int64 or None, shape (T,)
        Position of each row; rows of the base model point at one more, which adds nothing.
    pointers : tuple of int
        Addresses of `rows` and `groups`, and how many groups there are: asked for in each layer.
    """

    size: int
    used: tuple[int, ...]
    rows: Tensor
    groups: Tensor
    blocks: tuple[Block, ...]
    gather: Tensor | None = None
    scatter: Tensor | None = None
    pointers: tuple[int, int, int] = field(init=False)
    _buffers: dict[tuple[str, int, torch.dtype], Buffers] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pointers = self.rows.data_ptr(), self.groups.data_ptr(), self.groups.size(0)
        object.__setattr__(self, "pointers", pointers)

    @classmethod
    def of(cls, indices: Tensor) -> StepPlan:
        """Lay out the rows whose slots are ``indices``, shape (T,), -1 for the base model."""
        rows, groups, size = RowPlan.of(indices)
        used = tuple(slot for slot, _, _ in groups)
        adapted = torch.arange(size) if rows is None else rows
        known = (size, used, adapted, torch.tensor(groups, dtype=torch.int64).view(-1, 3))
        if rows is None or not used:
            blocks = (Block((used[0], used[0] + 1), 0, size),) if used else ()
            return cls(*known, blocks)
        first, batch = used[0], used[-1] - used[0] + 1
        longest = max(stop - start for _, start, stop in groups)
        if batch * longest <= MAX_PADDING * rows.numel():
            blocks = (Block((first, first + batch), 0, batch * longest),)
            starts = [(slot - first) * longest for slot in used]
        else:
            blocks = tuple(Block((slot, slot + 1), start, stop) for slot, start, stop in groups)
            starts = [start for _, start, _ in groups]
        spans = zip(starts, groups, strict=True)
        positions = torch.cat([torch.arange(at, at + stop - start) for at, (_, start, stop) in spans])
        gather = rows.new_zeros(blocks[-1].stop).index_copy_(0, positions, rows)
        scatter = torch.full((size,), blocks[-1].stop).index_copy_(0, rows, positions)
        return cls(*known, blocks, gather, scatter)

    def collect(self, values: Tensor) -> Sequence[Tensor]:
        """Return ``values``, (T, width), of all rows at their positions, in one part for each block."""
        if self.gather is None:
            return (values.unsqueeze(0),)
        values = values.index_select(0, self.gather)
        return [block.of(values) for block in self.blocks]

    def buffers(self, role: str, width: int, dtype: torch.dtype) -> Buffers:
        """Return buffers that last as long as the plan; layers share those of one role, width and dtype."""
        key = role, width, dtype
        if key not in self._buffers:
            positions = self.blocks[-1].stop
            padded = torch.empty(positions + 1, width, dtype=dtype)
            # Minus zero is the number that changes no other when added, not even the sign of a zero.
            padded[positions] = -0.0
            whole = padded[:-1]
            self._buffers[key] = Buffers(padded, whole, tuple(block.of(whole) for block in self.blocks))
        return self._buffers[key]

    def add(self, target: Tensor, products: Buffers) -> None:
        """Add filled buffers to the rows of ``target``, shape (T, O)."""
        if self.scatter is None:
            target.add_(products.whole)
        else:
            target.add_(products.padded.index_select(0, self.scatter))
