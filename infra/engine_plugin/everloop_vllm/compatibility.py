# SPDX-License-Identifier: Apache-2.0
"""What of vLLM this plug-in replaces or builds on, and whether it is what it was written for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

OPERATIONS = {
    "bgmv_shrink": "inputs lora_b_weights output_tensor lora_indices_tensor scaling",
    "bgmv_expand": "inputs lora_b_weights output_tensor lora_indices_tensor add_inputs",
    "bgmv_expand_slice": "inputs lora_b_weights output_tensor lora_indices_tensor slice_offset slice_size "
    "add_inputs",
    "sgmv_shrink": "inputs lora_a_weights output_tensor b_seq_start_loc seq_len_tensor lora_indices_tensor batches "
    "max_seq_length token_nums scaling",
    "sgmv_expand": "inputs lora_b_weights output_tensor b_seq_start_loc seq_len_tensor lora_indices_tensor batches "
    "max_seq_length token_nums add_inputs",
    "sgmv_expand_slice": "inputs lora_b_weights output_tensor b_seq_start_loc seq_len_tensor lora_indices_tensor "
    "batches max_seq_length token_nums slice_offset slice_size add_inputs",
}
"""Functions that are replaced, with the parameters that they must have."""

METHODS = {
    "update_metadata": "self mapping lora_index_to_id max_loras vocab_size kwargs",
    "add_lora_linear": "self y x lora_a_stacked lora_b_stacked scale output_slices buffer kwargs",
    "add_lora_logits": "self y x lora_a_stacked lora_b_stacked scale buffer kwargs",
}
"""Methods of vLLM's CPU wrapper that are overridden, with the parameters that they must have."""

PROPERTIES = ("token_lora_indices", "sampler_indices")
"""Properties of the wrapper that the overriding methods read."""


def mismatch() -> str | None:
    """Return what differs from the vLLM that this plug-in was written for; None if nothing does."""
    try:
        from vllm.lora.ops import torch_ops
        from vllm.lora.ops.torch_ops import lora_ops
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
        from vllm.platforms.cpu import CpuPlatform
    except ImportError as error:
        return str(error)
    from vllm.lora.punica_wrapper import punica_cpu

    for module in (lora_ops, torch_ops, punica_cpu):
        for name, expected in OPERATIONS.items():
            if not _takes(getattr(module, name, None), expected):
                return f"{module.__name__}.{name}"
    for name, expected in METHODS.items():
        if not _takes(getattr(PunicaWrapperCPU, name, None), expected):
            return f"PunicaWrapperCPU.{name}"
    for name in PROPERTIES:
        if not isinstance(getattr(PunicaWrapperCPU, name, None), property):
            return f"PunicaWrapperCPU.{name}"
    if not inspect.ismethod(getattr(CpuPlatform, "get_punica_wrapper", None)):
        return "CpuPlatform.get_punica_wrapper"
    return None


def _takes(function: Callable[..., Any] | None, parameters: str) -> bool:
    return callable(function) and list(inspect.signature(function).parameters) == parameters.split()
