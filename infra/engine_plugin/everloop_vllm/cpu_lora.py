# SPDX-License-Identifier: Apache-2.0
"""LoRA on the CPU with one product per adapter instead of one weight copy per token.

vLLM keeps the adapters of a layer in stacked buffers with one slot per loaded adapter
and gives each token the index of its slot, -1 for the base model. Here the rows of a
step are grouped by slot once, and each layer multiplies each group once, in float32: at
the size of an adapter, float32 products run faster on a CPU than bfloat16 ones.

Groups never share a product, so an adapter holding NaN or infinity reaches only its own
requests. Rows of index -1 are not touched.

Shapes use T rows (tokens), S slots, R rank, I input width and O output width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.lora.ops import torch_ops
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.platforms.cpu import CpuPlatform

from everloop_vllm import grouped_ops
from everloop_vllm.grouped_ops import RowPlan

_OPERATIONS = (
    "bgmv_shrink",
    "bgmv_expand",
    "bgmv_expand_slice",
    "sgmv_shrink",
    "sgmv_expand",
    "sgmv_expand_slice",
)


class FloatCopies:
    """Float32 copies of one layer's adapters, made per slot when first used.

    vLLM overwrites a slot in place when it loads another adapter. Every such write
    raises the version counter of its buffer, and any change of a counter drops all
    copies of the layer: a stale copy would serve the wrong policy.

    Parameters
    ----------
    stacks_a, stacks_b : tuple of Tensor
        The stacked buffers, one per slice: (S, 1, R, I) and (S, 1, O, R).
    """

    def __init__(self, stacks_a: tuple[Tensor, ...], stacks_b: tuple[Tensor, ...]) -> None:
        # Holding the buffers keeps their ids, by which this object is found, from reuse.
        self._a, self._b = stacks_a, stacks_b
        # Tensors made in inference mode carry no counter: those are never cached.
        self._counted = not any(stack.is_inference() for stack in (*stacks_a, *stacks_b))
        self._versions: list[int] = []
        self._slots: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def slot(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """Return A of all slices, (I, slices * R), and B of each slice, (R, O)."""
        versions = [stack._version for stack in (*self._a, *self._b)] if self._counted else []
        if versions != self._versions or not self._counted:
            self._slots.clear()
            self._versions = versions
        if index not in self._slots:
            a = torch.cat([stack[index, 0] for stack in self._a]).float()
            self._slots[index] = a.t(), [stack[index, 0].float().t() for stack in self._b]
        return self._slots[index]


class GroupedPunicaWrapper(punica_cpu.PunicaWrapperCPU):
    """vLLM's CPU LoRA wrapper, with rows grouped once per step for the linear layers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plan = RowPlan(None, [], 0)
        self._copies: dict[tuple[int, ...], FloatCopies] = {}

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Take over the step's adapter mapping and group its rows."""
        super().update_metadata(*args, **kwargs)
        self._plan = RowPlan.of(self.token_lora_indices)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add ``scale * x A^T B^T`` of each row's adapter to ``y``, in place.

        Parameters
        ----------
        y : Tensor, shape (T, sum of output_slices)
        x : Tensor, shape (T, I)
        lora_a_stacked, lora_b_stacked : tuple of Tensor
            One stack per slice, (S, 1, R, I) and (S, 1, O, R).
        scale : float
        output_slices : tuple of int
            Width O of each slice; slices lie side by side in ``y``.
        buffer : tuple of Tensor, optional
            Where a caller wants the rank-R products; served by vLLM's own method.
        """
        if buffer is not None:
            args = (y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)
            super().add_lora_linear(*args, buffer=buffer, **kwargs)
            return
        if not x.size(0) == y.size(0) == self._plan.size:
            raise ValueError(f"LoRA plan has {self._plan.size} rows, the layer {x.size(0)}")
        if self._plan.groups:
            copies = self._copies_of(lora_a_stacked, lora_b_stacked)
            self._add_groups(y, x, copies, scale, output_slices)

    def _copies_of(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> FloatCopies:
        key = tuple(map(id, (*a, *b)))
        if key not in self._copies:
            self._copies[key] = FloatCopies(a, b)
        return self._copies[key]

    def _add_groups(self, y: Tensor, x: Tensor, copies: FloatCopies, scale: float, widths: tuple[int, ...]) -> None:
        inputs, outputs = self._plan.take(x), self._plan.take(y)
        for slot, start, stop in self._plan.groups:
            a, b = copies.slot(slot)
            shrunk = torch.mm(inputs[start:stop], a).chunk(len(b), dim=1)
            parts = outputs[start:stop, : sum(widths)].split(widths, dim=1)
            for part, hidden, weight in zip(parts, shrunk, b, strict=True):
                part.addmm_(hidden, weight, alpha=scale)
        self._plan.put(y, outputs)


def install() -> None:
    """Put the grouped operations and wrapper in the place of vLLM's own."""
    for module in (lora_ops, torch_ops, punica_cpu):
        for name in _OPERATIONS:
            setattr(module, name, getattr(grouped_ops, name))
    wrapper = f"{__name__}.{GroupedPunicaWrapper.__name__}"
    CpuPlatform.get_punica_wrapper = classmethod(lambda cls: wrapper)
