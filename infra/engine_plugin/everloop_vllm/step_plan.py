# SPDX-License-Identifier: Apache-2.0
"""How the rows of one step are laid out, so that each layer multiplies all adapters at once.

A step's mapping is the same for every layer, and mostly for many steps: what can be worked
out from it is worked out here, once. Shapes use T rows (tokens) and O output width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from everloop_vllm.grouped_ops import RowPlan

MAX_PADDING = 2.0
"""Positions per row up to which groups are padded to one size and multiplied in one call."""


@dataclass(frozen=True, slots=True)
class Block:
    """Positions that one batched product serves.

    Attributes
    ----------
    slots : slice
        The adapter slots, one matrix of the batch each; those in between may be unused.
    start, stop : int
        The positions, an equal number for each slot.
    batch : int
        Number of slots.
    """

    slots: slice
    start: int
    stop: int
    batch: int

    def of(self, values: Tensor) -> Tensor:
        """Return this block's positions of ``values`` as (batch, positions each, width)."""
        return values[self.start : self.stop].unflatten(0, (self.batch, -1))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows of one step, at positions grouped by adapter slot.

    Attributes
    ----------
    size : int
        Rows T of the step, those of the base model included.
    used : tuple of int
        Slots that some row uses, ascending.
    blocks : tuple of Block
        Batched products that serve all positions; empty if all rows are the base model's.
    gather : Tensor of int64 or None
        Row at each position (any row, where a position only pads its group). None if
        rows and positions are the same, as when one adapter has every row.
    scatter : Tensor of int64 or None, shape (T,)
        Position of each row; rows of the base model point at one more, which adds nothing.
    """

    size: int
    used: tuple[int, ...]
    blocks: tuple[Block, ...]
    gather: Tensor | None = None
    scatter: Tensor | None = None
    _buffers: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, indices: Tensor) -> StepPlan:
        """Lay out the rows whose slots are ``indices``, shape (T,), -1 for the base model."""
        rows, groups, size = RowPlan.of(indices)
        used = tuple(slot for slot, _, _ in groups)
        if rows is None or not used:
            blocks = (Block(slice(used[0], used[0] + 1), 0, size, 1),) if used else ()
            return cls(size, used, blocks)
        first, batch = used[0], used[-1] - used[0] + 1
        longest = max(stop - start for _, start, stop in groups)
        if batch * longest <= MAX_PADDING * rows.numel():
            blocks = (Block(slice(first, first + batch), 0, batch * longest, batch),)
            starts = [(slot - first) * longest for slot in used]
        else:
            blocks = tuple(Block(slice(slot, slot + 1), start, stop, 1) for slot, start, stop in groups)
            starts = [start for _, start, _ in groups]
        spans = zip(starts, groups, strict=True)
        positions = torch.cat([torch.arange(at, at + stop - start) for at, (_, start, stop) in spans])
        gather = rows.new_zeros(blocks[-1].stop).index_copy_(0, positions, rows)
        scatter = torch.full((size,), blocks[-1].stop).index_copy_(0, rows, positions)
        return cls(size, used, blocks, gather, scatter)

    def collect(self, values: Tensor) -> Tensor:
        """Return ``values`` of all rows at their positions."""
        return values if self.gather is None else values.index_select(0, self.gather)

    def buffer(self, width: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised buffer, (positions, width), that lasts as long as the plan.

        Allocating anew in each layer costs as much there as a small product.
        """
        return self._padded(width, dtype)[:-1]

    def add(self, target: Tensor, products: Tensor) -> None:
        """Add a filled :meth:`buffer` to the rows of ``target``, shape (T, O)."""
        if self.scatter is not None:
            products = self._padded(products.size(1), products.dtype).index_select(0, self.scatter)
        target.add_(products)

    def _padded(self, width: int, dtype: torch.dtype) -> Tensor:
        key = width, dtype
        if key not in self._buffers:
            # Minus zero is the number that changes no other when added, not even the sign of a zero.
            positions = self.blocks[-1].stop
            self._buffers[key] = torch.empty(positions + 1, width, dtype=dtype)
            self._buffers[key][positions] = -0.0
        return self._buffers[key]
