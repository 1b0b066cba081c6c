# SPDX-License-Identifier: Apache-2.0
"""A layer's adapters added to its rows by one call of our own code, ``row_products.cpp``.

It is compiled when the plug-in is installed. Where no compiler was found, torch's products
serve every step.
"""

from __future__ import annotations

import ctypes
from importlib.util import find_spec

import torch
from torch import Tensor

from everloop_vllm.stacks import Presence
from everloop_vllm.step_plan import StepPlan

MAX_RANK = 512
"""Of all slices together, each filled up to whole panels: what the code has room for."""


def _load() -> ctypes.PyDLL | None:
    spec = find_spec("everloop_vllm._row_products")
    if spec is None or spec.origin is None:
        return None
    # PyDLL keeps the interpreter's lock: given away in each of 120 calls a step, it comes back late
    # where the API server runs in this process.
    try:
        library = ctypes.PyDLL(spec.origin)
    except OSError:  # made on a machine with other libraries
        return None
    library.everloop_lanes.restype = ctypes.c_long
    address, number = ctypes.c_void_p, ctypes.c_long
    library.everloop_add_rows.argtypes = [
        *(address, number) * 2, address, address, number, *(address, number) * 2,
        number, number, number, address, ctypes.c_float, number,
    ]  # fmt: skip
    library.everloop_add_rows.restype = None
    return library


LIBRARY = _load()
LANES = LIBRARY.everloop_lanes() if LIBRARY is not None else 0


class RowStacks(Presence):
    """One layer's adapters, copied per slot when first used, in the order in which they are read.

    Rows of different slots share nothing, so an adapter holding NaN or infinity reaches only its own.

    Parameters
    ----------
    stacks_a, stacks_b : tuple of Tensor of bfloat16
        vLLM's buffers, one per slice: (S, 1, rank, I) and (S, 1, width, rank).
    """

    def __init__(self, stacks_a: tuple[Tensor, ...], stacks_b: tuple[Tensor, ...]) -> None:
        super().__init__(stacks_a, stacks_b)
        slots, _, rank, inputs = stacks_a[0].shape
        widths = [stack.size(2) for stack in stacks_b]
        # Memory that no slot was copied to is never touched, so unused slots take none.
        self._panels_a = torch.zeros(slots, len(widths) * _padded(rank) * inputs, dtype=torch.bfloat16)
        self._panels_b = torch.zeros(slots, sum(widths) * rank, dtype=torch.bfloat16)
        self._widths = torch.tensor(widths)
        self._inputs, self._width = inputs, sum(widths)
        self._layer = (
            self._panels_a.data_ptr(), self._panels_a.size(1), self._panels_b.data_ptr(), self._panels_b.size(1),
            inputs, rank, len(widths), self._widths.data_ptr(),
        )  # fmt: skip

    @staticmethod
    def fits(stacks_a: tuple[Tensor, ...], stacks_b: tuple[Tensor, ...], dtypes: set[torch.dtype]) -> bool:
        """Whether the code is there and takes these shapes, and activations of ``dtypes``."""
        if LIBRARY is None:
            return False
        ranks = {stack.size(2) for stack in stacks_a} | {stack.size(3) for stack in stacks_b}
        sizes = {stack.size(3) for stack in stacks_a} | {stack.size(2) for stack in stacks_b}
        return (
            dtypes | {stack.dtype for stack in (*stacks_a, *stacks_b)} == {torch.bfloat16}
            and len(ranks) == 1
            and _padded(*ranks) * len(stacks_a) <= MAX_RANK
            and all(size % LANES == 0 for size in sizes)
        )

    def look(self, slot: int) -> bool:
        """Copy a slot, too."""
        self._panels_a[slot] = torch.cat([_panels(stack[slot, 0]) for stack in self._a])
        self._panels_b[slot] = torch.cat([_panels(stack[slot, 0]) for stack in self._b])
        return super().look(slot)

    def add(self, y: Tensor, x: Tensor, plan: StepPlan, scale: float) -> None:
        """Add ``scale * x A^T B^T`` to the rows of ``y``, (T, O), in place; ``x`` is (T, I).

        Neighbours in a row of either must lie side by side.
        """
        if x.size(1) != self._inputs or y.size(1) != self._width:
            raise ValueError(f"LoRA of {self._inputs} to {self._width} columns, got {x.size(1)} and {y.size(1)}")
        assert LIBRARY is not None
        LIBRARY.everloop_add_rows(
            x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0),
            *plan.pointers, *self._layer, scale, LANES,
        )  # fmt: skip


def _padded(rank: int) -> int:
    return rank + -rank % LANES


def _panels(weights: Tensor) -> Tensor:
    """Return a matrix, (M, N), in panels of (N, lanes), the last one filled up with zeros; flat."""
    fill = -weights.size(0) % LANES
    padded = torch.nn.functional.pad(weights, (0, 0, 0, fill))
    return padded.unflatten(0, (-1, LANES)).transpose(1, 2).flatten()
