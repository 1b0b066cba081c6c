# SPDX-License-Identifier: Apache-2.0
"""Copies of a layer's adapters, laid out for the CPU's fast products.

vLLM keeps the adapters of a layer in stacked buffers, one slot per adapter and one pair of
buffers per slice (q, k and v are slices of one layer). A copy joins the slices: A side by
side, B block-diagonal, so that a layer takes two products whatever it was merged from.

Shapes use S slots, N batch, P positions each, R rank of all slices, I input and O output width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from vllm import _custom_ops as _loads_the_kernels  # noqa: F401

TILE = 32
"""Multiple of which the packed products want every dimension of the weights."""

HAS_PACKED_PRODUCTS = torch.cpu._is_amx_tile_supported() and hasattr(torch.ops._C, "bmm_cpu")
"""Whether vLLM's small packed products are fast here; it asks for the same before it uses them itself."""


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


class AdapterStacks(Presence, ABC):
    """One layer's adapters, copied per slot when first used.

    Attributes
    ----------
    width, hidden_width : int
        Columns of the products: O, and those between A and B (at least R).
    hidden_dtype : torch.dtype
        What is kept between A and B.

    Parameters
    ----------
    stacks_a, stacks_b : tuple of Tensor
        vLLM's buffers, one per slice: (S, 1, rank, I) and (S, 1, width, rank).
    """

    hidden_dtype: torch.dtype
    hidden_width: int
    _packed_a: Tensor
    _packed_b: Tensor

    def __init__(self, stacks_a: tuple[Tensor, ...], stacks_b: tuple[Tensor, ...]) -> None:
        super().__init__(stacks_a, stacks_b)
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.num_slots, self.width = stacks_a[0].size(0), sum(stack.size(2) for stack in stacks_b)
        self.rank, self.inputs = sum(stack.size(2) for stack in stacks_a), stacks_a[0].size(3)

    def look(self, slot: int) -> bool:
        """Copy a slot, too."""
        a = torch.cat([stack[slot, 0] for stack in self._a])
        self.store(slot, a, torch.block_diag(*(stack[slot, 0] for stack in self._b)))
        return super().look(slot)

    @abstractmethod
    def store(self, slot: int, a: Tensor, b: Tensor) -> None:
        """Keep A, (R, I), and B, (O, R), of a slot."""

    @abstractmethod
    def multiply(self, inputs: Tensor, slots: tuple[int, int], scale: float, hidden: Tensor, out: Tensor) -> None:
        """Set ``out``, (N, P, O), to ``scale`` times ``inputs``, (N, P, I), through N slots.

        ``hidden``, (N, P, hidden_width), is overwritten.
        """

    def packed(self, slots: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the copies of A and of B of a range of slots."""
        if slots not in self._views:
            self._views[slots] = self._packed_a[slice(*slots)], self._packed_b[slice(*slots)]
        return self._views[slots]


class FloatStacks(AdapterStacks):
    """Float32 copies: on any CPU faster than small products of half precision."""

    hidden_dtype = torch.float32

    def __init__(self, stacks_a: tuple[Tensor, ...], stacks_b: tuple[Tensor, ...]) -> None:
        super().__init__(stacks_a, stacks_b)
        self.hidden_width = self.rank
        # Memory that no slot was copied to is never touched, so unused slots take none.
        self._packed_a = torch.zeros(self.num_slots, self.inputs, self.rank)
        self._packed_b = torch.zeros(self.num_slots, self.rank, self.width)

    def store(self, slot: int, a: Tensor, b: Tensor) -> None:
        """Keep both transposed."""
        self._packed_a[slot] = a.t()
        self._packed_b[slot] = b.t()

    def multiply(self, inputs: Tensor, slots: tuple[int, int], scale: float, hidden: Tensor, out: Tensor) -> None:
        """Multiply in float32; only the result is rounded."""
        a, b = self.packed(slots)
        torch.bmm(inputs.float(), a, out=hidden)
        if scale != 1.0:
            hidden.mul_(scale)
        out.copy_(torch.bmm(hidden, b))


class PackedStacks(AdapterStacks):
    """Bfloat16 copies in the layout of vLLM's own small products, for CPUs with AMX tiles.

    Half the memory traffic of float32. As in vLLM's shipped path, the rank-R products are
    rounded to bfloat16.
    """

    hidden_dtype = torch.bfloat16

    def __init__(self, stacks_a: tuple[Tensor, ...], stacks_b: tuple[Tensor, ...]) -> None:
        super().__init__(stacks_a, stacks_b)
        self.hidden_width = -(-self.rank // TILE) * TILE
        self._packed_a = torch.zeros(self.num_slots, self.hidden_width, self.inputs, dtype=torch.bfloat16)
        self._packed_b = torch.zeros(self.num_slots, self.width, self.hidden_width, dtype=torch.bfloat16)
        self._bmm = torch.ops._C.bmm_cpu.default

    @staticmethod
    def fits(stacks_a: tuple[Tensor, ...], stacks_b: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
        """Whether this CPU, these shapes and activations of ``dtype`` allow it."""
        inputs, width = stacks_a[0].size(3), sum(stack.size(2) for stack in stacks_b)
        dtypes = {dtype, *(stack.dtype for stack in (*stacks_a, *stacks_b))}
        return HAS_PACKED_PRODUCTS and dtypes == {torch.bfloat16} and inputs % TILE == width % TILE == 0

    def store(self, slot: int, a: Tensor, b: Tensor) -> None:
        """Fill the rank up to whole tiles with zeros, and pack."""
        fill = self.hidden_width - self.rank
        self._packed_a[slot] = torch.ops._C.convert_weight_packed(torch.nn.functional.pad(a, (0, 0, 0, fill)))
        self._packed_b[slot] = torch.ops._C.convert_weight_packed(torch.nn.functional.pad(b, (0, fill)))

    def multiply(self, inputs: Tensor, slots: tuple[int, int], scale: float, hidden: Tensor, out: Tensor) -> None:
        """Multiply in bfloat16 with float32 sums."""
        a, b = self.packed(slots)
        self._bmm(hidden, inputs, a, True, None)
        if scale != 1.0:
            hidden.mul_(scale)
        self._bmm(out, hidden, b, True, None)


def stacks_of(stacks_a: tuple[Tensor, ...], stacks_b: tuple[Tensor, ...], dtype: torch.dtype) -> AdapterStacks:
    """Return the copies that suit this CPU, these buffers, and activations of ``dtype``."""
    return (PackedStacks if PackedStacks.fits(stacks_a, stacks_b, dtype) else FloatStacks)(stacks_a, stacks_b)
