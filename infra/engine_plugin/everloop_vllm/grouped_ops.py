# SPDX-License-Identifier: Apache-2.0
"""The six LoRA operations of vLLM's CPU path, with rows grouped by adapter.

As shipped, each copies an adapter's weights once per token; here each multiplies once
per adapter, in float32. The ``sgmv`` forms differ from the ``bgmv`` forms only in that
they take one index per segment of rows; segments lie end to end.

Shapes use T rows (tokens), S slots, R rank, I input width and O output width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowPlan(NamedTuple):
    """The rows of one step, sorted by adapter slot.

    Attributes
    ----------
    rows : Tensor or None
        Row numbers ordered by slot, without those of the base model; None when one
        adapter has every row, so that nothing needs to be gathered.
    groups : list of (slot, start, stop)
        For each slot in use, its range of positions within ``rows``.
    size : int
        Rows in the step, those of the base model included.
    """

    rows: Tensor | None
    groups: list[tuple[int, int, int]]
    size: int

    @classmethod
    def of(cls, indices: Tensor) -> RowPlan:
        """Group rows by slot; ``indices`` holds one slot number per row, shape (T,)."""
        order = torch.argsort(indices, stable=True)
        slots, counts = torch.unique_consecutive(indices[order], return_counts=True)
        groups, start = [], 0
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            if slot >= 0:
                groups.append((slot, start, start + count))
                start += count
        whole = len(groups) == 1 and start == indices.numel()
        return cls(None if whole else order[indices.numel() - start :], groups, indices.numel())

    def take(self, values: Tensor) -> Tensor:
        """Return the adapters' rows of ``values`` in slot order, as float32."""
        return (values if self.rows is None else values.index_select(0, self.rows)).float()

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write ``values``, in slot order, back to the adapters' rows of ``target``."""
        if self.rows is None:
            target.copy_(values)
        else:
            target.index_copy_(0, self.rows, values.to(target.dtype))


def bgmv_shrink(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    scaling: float = 1.0,
) -> None:
    """Set ``output[:, :R] = scaling * inputs A^T``, zero in rows of index -1.

    Parameters
    ----------
    inputs : Tensor, shape (T, I)
    lora_b_weights : Tensor, shape (S, 1, R, I) or (S, R, I)
        The A stack; the name is vLLM's.
    output_tensor : Tensor, shape (T, >= R)
    lora_indices_tensor : Tensor of int64, shape (T,)
        Slot of each row, -1 for none.
    scaling : float
    """
    products = _multiply(inputs, lora_b_weights, lora_indices_tensor, output_tensor.size(0))
    output_tensor[:, : products.size(1)] = products.mul_(scaling)


def bgmv_expand_slice(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """Add to, or set, ``output[:, offset : offset + size]`` with ``inputs B^T``.

    Parameters
    ----------
    inputs : Tensor, shape (T, R)
    lora_b_weights : Tensor, shape (S, 1, O, R) or (S, O, R)
    output_tensor : Tensor, shape (T, >= slice_offset + slice_size)
    lora_indices_tensor : Tensor of int64, shape (T,)
    slice_offset, slice_size : int
        Columns of the output; ``slice_size`` equals O.
    add_inputs : bool
        Add to the output if true, else overwrite it (with zero in rows of index -1).
    """
    if add_inputs and not bool((lora_indices_tensor >= 0).any()):
        return
    products = _multiply(inputs, lora_b_weights, lora_indices_tensor, output_tensor.size(0))
    target = output_tensor[:, slice_offset : slice_offset + slice_size]
    target.add_(products) if add_inputs else target.copy_(products)


def bgmv_expand(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    add_inputs: bool = True,
) -> None:
    """Do as :func:`bgmv_expand_slice` on the columns that weights and output share."""
    # Adapter and model may pad the vocabulary to different widths.
    size = min(lora_b_weights.size(-2), output_tensor.size(1))
    weights = lora_b_weights[..., :size, :]
    bgmv_expand_slice(inputs, weights, output_tensor, lora_indices_tensor, 0, size, add_inputs)


def sgmv_shrink(
    inputs: Tensor,
    lora_a_weights: Tensor,
    output_tensor: Tensor,
    b_seq_start_loc: Tensor,
    seq_len_tensor: Tensor,
    lora_indices_tensor: Tensor,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    scaling: float,
) -> None:
    """Do as :func:`bgmv_shrink`, each of ``seq_len_tensor`` rows sharing one index."""
    indices = torch.repeat_interleave(lora_indices_tensor, seq_len_tensor)
    bgmv_shrink(inputs, lora_a_weights, output_tensor, indices, scaling)


def sgmv_expand(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    b_seq_start_loc: Tensor,
    seq_len_tensor: Tensor,
    lora_indices_tensor: Tensor,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    add_inputs: bool = False,
) -> None:
    """Do as :func:`bgmv_expand`, each of ``seq_len_tensor`` rows sharing one index."""
    indices = torch.repeat_interleave(lora_indices_tensor, seq_len_tensor)
    bgmv_expand(inputs, lora_b_weights, output_tensor, indices, add_inputs)


def sgmv_expand_slice(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    b_seq_start_loc: Tensor,
    seq_len_tensor: Tensor,
    lora_indices_tensor: Tensor,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = False,
) -> None:
    """Do as :func:`bgmv_expand_slice`, each of ``seq_len_tensor`` rows sharing one index."""
    indices = torch.repeat_interleave(lora_indices_tensor, seq_len_tensor)
    columns = (slice_offset, slice_size)
    bgmv_expand_slice(inputs, lora_b_weights, output_tensor, indices, *columns, add_inputs)


def _multiply(inputs: Tensor, weights: Tensor, indices: Tensor, rows: int) -> Tensor:
    """Return each row times its slot's transposed weight: float32, (rows, O)."""
    # Like vLLM's, a single input row or a single index stands for all rows.
    plan = RowPlan.of(indices.expand(rows))
    values = plan.take(inputs.expand(rows, -1))
    products = values.new_zeros(rows, weights.size(-2))
    for slot, start, stop in plan.groups:
        weight = weights[slot].view(weights.shape[-2:]).float()
        where = slice(start, stop) if plan.rows is None else plan.rows[start:stop]
        products[where] = values[start:stop] @ weight.t()
    return products
