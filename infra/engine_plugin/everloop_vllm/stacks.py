# SPDX-License-Identifier: Apache-2.0
"""Copies of a layer's adapters, laid out for the CPU's fast products.

vLLM keeps the adapters of a layer in stacked buffers, one slot per adapter and one pair of
buffers per slice (q, k and v are slices of one layer).

Shapes use S slots, T rows, R rank of all slices, I input and O output width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from everloop_vllm.step_plan import StepPlan


class Presence:
    """Which slots of a layer hold an adapter that adds something; looked at when first used.

    vLLM overwrites a slot in place when it loads another adapter. Every such write raises
    the version counter of its buffer, and any change of a counter drops all that is known
    of the layer: a stale copy would serve the wrong policy.

    Parameters
    ----------
    stacks_a, stacks_b : tuple of Tensor
        vLLM's buffers, one per slice: (S, 1, rank, I) and (S, 1, width, rank).
    """

    def __init__(self, stacks_a: tuple[Tensor, ...], stacks_b: tuple[Tensor, ...]) -> None:
        # Holding the buffers keeps their ids, by which this object is found, from reuse.
        self._a, self._b = stacks_a, stacks_b
        self._watched = (*stacks_a, *stacks_b)
        # Tensors made in inference mode carry no counter: those are copied for every call.
        self._counted = not any(stack.is_inference() for stack in self._watched)
        self._versions: list[int] = []
        self._present: dict[int, bool] = {}

    def refresh(self, slots: tuple[int, ...]) -> bool:
        """Look anew at what was written since; return whether any of ``slots`` adds something."""
        versions = [stack._version for stack in self._watched] if self._counted else []
        if versions != self._versions or not self._counted:
            self._present.clear()
            self._versions = versions
        found = False
        for slot in slots:
            present = self._present.get(slot)
            if present is None:
                present = self._present[slot] = self.look(slot)
            found = found or present
        return found

    def look(self, slot: int) -> bool:
        """Return whether a slot adds something: vLLM fills it with zeros if the adapter has no such module."""
        # NaN counts as something in B; in A it does too, though B be zero.
        adds = any(bool(stack[slot].any()) for stack in self._b)
        return adds or not all(bool(stack[slot].isfinite().all()) for stack in self._a)


class FloatStacks(Presence):
    """One layer's adapters, copied per slot when first used, in float32.

    On any CPU faster than small products of half precision. A copy joins the slices: A side by
    side, B block-diagonal, so that a layer takes two products whatever it was merged from.

    Parameters
    ----------
    stacks_a, stacks_b : tuple of Tensor
        vLLM's buffers, one per slice: (S, 1, rank, I) and (S, 1, width, rank).
    """

    def __init__(self, stacks_a: tuple[Tensor, ...], stacks_b: tuple[Tensor, ...]) -> None:
        super().__init__(stacks_a, stacks_b)
        self._width = sum(stack.size(2) for stack in stacks_b)
        self._rank = sum(stack.size(2) for stack in stacks_a)
        slots, inputs = stacks_a[0].size(0), stacks_a[0].size(3)
        # Memory that no slot was copied to is never touched, so unused slots take none.
        self._all_a = torch.zeros(slots, inputs, self._rank)
        self._all_b = torch.zeros(slots, self._rank, self._width)

    def look(self, slot: int) -> bool:
        """Copy a slot, too."""
        self._all_a[slot] = torch.cat([stack[slot, 0] for stack in self._a]).t()
        self._all_b[slot] = torch.block_diag(*(stack[slot, 0] for stack in self._b)).t()
        return super().look(slot)

    def add(self, y: Tensor, x: Tensor, plan: StepPlan, scale: float) -> None:
        """Add ``scale * x A^T B^T`` to the rows of ``y``, (T, O), in place; ``x`` is (T, I).

        In float32; only the result is rounded.
        """
        hidden = plan.buffers("hidden", self._rank, torch.float32)
        products = plan.buffers("products", self._width, y.dtype)
        parts = zip(plan.blocks, plan.collect(x), hidden.parts, products.parts, strict=True)
        for block, inputs, between, out in parts:
            slots = slice(*block.slots)
            torch.bmm(inputs.float(), self._all_a[slots], out=between)
            if scale != 1.0:
                between.mul_(scale)
            out.copy_(torch.bmm(between, self._all_b[slots]))
        plan.add(y, products)
