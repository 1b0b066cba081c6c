# SPDX-License-Identifier: Apache-2.0
"""LoRA on the CPU with one product for all adapters instead of one weight copy per token.

vLLM keeps the adapters of a layer in stacked buffers with one slot per loaded adapter
and gives each token the index of its slot, -1 for the base model. Here the rows of a
step are grouped by slot once, and each layer adds all groups in one call of our own code
or, where that does not fit, by two batched products of torch; both read copies of the
weights in the layout that they like best.

Groups never share a product, so an adapter holding NaN or infinity reaches only its own
requests. Rows of index -1 keep their bits.

Shapes use T rows (tokens), S slots, R rank, I input width and O output width. Models run
eagerly: a compiled one would trace the caches as constants.
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
from everloop_vllm.compatibility import OPERATIONS
from everloop_vllm.row_stacks import RowStacks
from everloop_vllm.stacks import FloatStacks, Presence
from everloop_vllm.step_plan import StepPlan


class GroupedPunicaWrapper(punica_cpu.PunicaWrapperCPU):
    """vLLM's CPU LoRA wrapper, with rows grouped once per step for the linear layers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plan = StepPlan.of(torch.empty(0, dtype=torch.long))
        self._heads: dict[int, Presence] = {}
        self._stacks: dict[tuple[int, int, torch.dtype, torch.dtype], RowStacks | FloatStacks] = {}

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Take over the step's adapter mapping and lay out its rows."""
        super().update_metadata(*args, **kwargs)
        self._plan = StepPlan.of(self.token_lora_indices)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add what each row's adapter has for the output head to the logits ``y``, in place.

        Most adapters have nothing for it; as shipped, each step adds zeros to all logits. And as
        shipped, the rows are taken for those that are sampled from; but those of prompt
        log-probabilities are a stretch of the step's rows, and beside other requests the engine
        dies of them, or gives them another request's adapter.

        Parameters
        ----------
        y : Tensor, shape (N, vocabulary)
        x : Tensor, shape (N, I)
            Hidden states: one row per sampled token, or a slice of those of the whole step.
        lora_a_stacked, lora_b_stacked : Tensor
            (S, 1, R, I) and (S, 1, vocabulary, R).
        scale : float
        buffer : Tensor, optional, shape (N, R)
        """
        stacks = self._heads.get(id(lora_b_stacked))
        if stacks is None:
            stacks = self._heads[id(lora_b_stacked)] = Presence((lora_a_stacked,), (lora_b_stacked,))
        if not stacks.refresh(self._plan.used):
            return
        rows = x.view(-1, x.size(-1))
        indices = self._indices_of(rows)
        if buffer is None:
            buffer = rows.new_zeros(rows.size(0), lora_b_stacked.size(-1), dtype=torch.float32)
        grouped_ops.bgmv_shrink(rows, lora_a_stacked, buffer, indices, scale)
        grouped_ops.bgmv_expand(buffer, lora_b_stacked, y.view(-1, y.size(-1)), indices, add_inputs=True)

    def _indices_of(self, rows: Tensor) -> Tensor:
        """Return the slot of each row: of a slice of the step's rows, or of the sampled ones."""
        is_slice = rows.untyped_storage().nbytes() > rows.nbytes
        if not is_slice and rows.size(0) == self.sampler_indices.numel():
            return self.sampler_indices
        start = rows.storage_offset() // rows.size(1)
        return self.token_lora_indices[start : start + rows.size(0)]

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
        plan = self._plan
        if not x.size(0) == y.size(0) == plan.size:
            raise ValueError(f"LoRA plan has {plan.size} rows, the layer {x.size(0)}")
        if not plan.blocks:
            return
        key = id(lora_a_stacked[0]), id(lora_b_stacked[0]), x.dtype, y.dtype
        stacks = self._stacks.get(key)
        if stacks is None:
            fits = RowStacks.fits(lora_a_stacked, lora_b_stacked, {x.dtype, y.dtype})
            stacks = self._stacks[key] = (RowStacks if fits else FloatStacks)(lora_a_stacked, lora_b_stacked)
        if not stacks.refresh(plan.used):
            return
        if x.stride(1) == y.stride(1) == 1:
            stacks.add(y, x, plan, scale)
        else:
            dense = y.contiguous()
            stacks.add(dense, x.contiguous(), plan, scale)
            y.copy_(dense)


def install() -> None:
    """Put the grouped operations and wrapper in the place of vLLM's own."""
    for module in (lora_ops, torch_ops, punica_cpu):
        for name in OPERATIONS:
            setattr(module, name, getattr(grouped_ops, name))
    wrapper = f"{__name__}.{GroupedPunicaWrapper.__name__}"
    CpuPlatform.get_punica_wrapper = classmethod(lambda cls: wrapper)
