# SPDX-License-Identifier: Apache-2.0
"""The plug-in against vLLM's own operations. Runs in the engine environment."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import everloop_vllm
import pytest
import torch
import vllm
import vllm.platforms
from everloop_vllm import cpu_lora, grouped_ops, stacks
from everloop_vllm.compatibility import OPERATIONS
from torch import Tensor
from vllm.lora.ops import torch_ops
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.platforms.cpu import CpuPlatform

SHIPPED: dict[str, Callable[..., None]] = {name: getattr(lora_ops, name) for name in OPERATIONS}
SLOTS, RANK = 5, 8
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Shipped products are rounded to the output's dtype at several points, ours at the end.
TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float32: 1e-4}
# Segments (slot, rows): single tokens as in decode, long runs as in prefill, both.
BATCHES: dict[str, list[tuple[int, int]]] = {
    "decode": [(2, 1), (-1, 1), (0, 1), (2, 1), (3, 1), (-1, 1), (0, 1)],
    "prefill": [(1, 40), (-1, 17), (3, 29)],
    "mixed": [(3, 1), (1, 33), (3, 1), (-1, 5), (0, 2), (1, 1)],
    "one adapter": [(2, 16)],
    "one row": [(1, 1)],
    "base": [(-1, 9)],
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Same numbers on every run, under the inference mode that vLLM serves in."""
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture(params=BATCHES)
def segments(request: pytest.FixtureRequest) -> list[tuple[int, int]]:
    """One batch's segments."""
    return BATCHES[request.param]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Dtype of weights and activations."""
    return request.param


def per_row(segments: list[tuple[int, int]]) -> Tensor:
    """Slot of each row."""
    return torch.tensor([slot for slot, rows in segments for _ in range(rows)])


def stack(out: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return a random stack, small enough for products near 1, with an empty last slot.

    As shipped, index -1 reads the last slot; left empty, it makes -1 mean "none" there too.
    """
    # Made outside inference mode, as vLLM makes them, so that they count their versions.
    with torch.inference_mode(False):
        weights = (torch.randn(SLOTS, 1, out, width) / width**0.5).to(dtype)
        weights[-1] = 0
    return weights


def sgmv_arguments(segments: list[tuple[int, int]]) -> tuple[Any, ...]:
    """Return what vLLM's ``prefill_metadata`` holds for the segments."""
    slots, lengths = (torch.tensor(column) for column in zip(*segments, strict=True))
    starts = lengths.cumsum(0) - lengths
    return starts, lengths, slots, len(segments), int(lengths.max()), int(lengths.sum())


def compare(name: str, output: Tensor, before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    """Run the shipped and the grouped operation on copies of ``output``."""
    expected, actual = output.clone(), output.clone()
    SHIPPED[name](*before, expected, *after)
    getattr(grouped_ops, name)(*before, actual, *after)
    limit = TOLERANCE[output.dtype]
    torch.testing.assert_close(actual, expected, atol=limit, rtol=limit)


def routed(kind: str, segments: list[tuple[int, int]]) -> tuple[Any, ...]:
    """Return the index arguments of a bgmv or of an sgmv operation."""
    return (per_row(segments),) if kind == "bgmv" else sgmv_arguments(segments)


@pytest.mark.parametrize("kind", ["bgmv", "sgmv"])
@pytest.mark.parametrize("scaling", [1.0, 0.37])
def test_shrink(kind: str, scaling: float, segments: list[tuple[int, int]], dtype: torch.dtype) -> None:
    rows = per_row(segments).numel()
    before = (torch.randn(rows, 96).to(dtype), stack(RANK, 96, dtype))
    # The output starts dirty and wider than the rank: only the rank's columns may change.
    output = torch.randn(rows, RANK + 3)
    compare(f"{kind}_shrink", output, before, (*routed(kind, segments), scaling))


@pytest.mark.parametrize("kind", ["bgmv", "sgmv"])
@pytest.mark.parametrize("add_inputs", [True, False, None])
@pytest.mark.parametrize("padding", [-4, 0, 4])
def test_expand(
    kind: str,
    add_inputs: bool | None,
    padding: int,
    segments: list[tuple[int, int]],
    dtype: torch.dtype,
) -> None:
    rows = per_row(segments).numel()
    before = (torch.randn(rows, RANK), stack(64, RANK, dtype))
    output = torch.randn(rows, 64 + padding).to(dtype)
    # None leaves the choice to the operation's own default.
    tail = () if add_inputs is None else (add_inputs,)
    compare(f"{kind}_expand", output, before, (*routed(kind, segments), *tail))


@pytest.mark.parametrize("kind", ["bgmv", "sgmv"])
@pytest.mark.parametrize("add_inputs", [True, False, None])
@pytest.mark.parametrize("offset", [0, 24])
def test_expand_slice(
    kind: str,
    add_inputs: bool | None,
    offset: int,
    segments: list[tuple[int, int]],
    dtype: torch.dtype,
) -> None:
    rows = per_row(segments).numel()
    before = (torch.randn(rows, RANK), stack(32, RANK, dtype))
    output = torch.randn(rows, 64).to(dtype)
    tail = () if add_inputs is None else (add_inputs,)
    compare(f"{kind}_expand_slice", output, before, (*routed(kind, segments), offset, 32, *tail))


@pytest.mark.parametrize("kind", ["bgmv", "sgmv"])
def test_three_dimensional_stack(kind: str) -> None:
    segments = BATCHES["mixed"]
    before = (torch.randn(per_row(segments).numel(), 96), stack(RANK, 96, torch.float32)[:, 0])
    output = torch.zeros(per_row(segments).numel(), RANK)
    compare(f"{kind}_shrink", output, before, (*routed(kind, segments), 1.0))


def shipped_wrapper(segments: list[tuple[int, int]]) -> punica_cpu.PunicaWrapperCPU:
    """Return vLLM's own wrapper, its metadata set."""
    return _prepare(punica_cpu.PunicaWrapperCPU(256, 256, "cpu"), segments)


def grouped_wrapper(segments: list[tuple[int, int]]) -> cpu_lora.GroupedPunicaWrapper:
    """Return this package's wrapper, its metadata set."""
    return _prepare(cpu_lora.GroupedPunicaWrapper(256, 256, "cpu"), segments)


def _prepare(wrapper: Any, segments: list[tuple[int, int]]) -> Any:
    # vLLM's adapter ids start at 1 and 0 means base; slot s holds adapter s + 1.
    ids = tuple((per_row(segments) + 1).tolist())
    mapping = SimpleNamespace(index_mapping=ids, prompt_mapping=ids, is_prefill=True)
    wrapper.update_metadata(mapping, list(range(1, SLOTS + 1)), SLOTS, 1000)
    return wrapper


# Output widths of o_proj, of gate_up_proj and of a qkv_proj with grouped heads.
@pytest.mark.parametrize("slices", [(48,), (40, 40), (48, 16, 16)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_linear(slices: tuple[int, ...], scale: float, segments: list[tuple[int, int]], dtype: torch.dtype) -> None:
    rows = per_row(segments).numel()
    a = tuple(stack(RANK, 96, dtype) for _ in slices)
    b = tuple(stack(out, RANK, dtype) for out in slices)
    x, y = torch.randn(rows, 96).to(dtype), torch.randn(rows, sum(slices)).to(dtype)
    expected, actual = y.clone(), y.clone()
    shipped_wrapper(segments).add_lora_linear(expected, x, a, b, scale, slices)
    grouped_wrapper(segments).add_lora_linear(actual, x, a, b, scale, slices)
    limit = TOLERANCE[dtype] * scale
    torch.testing.assert_close(actual, expected, atol=limit, rtol=limit)
    base = per_row(segments) == -1
    assert torch.equal(actual[base], y[base])
    assert base.all() or not torch.equal(actual, y)


def test_regrouped_each_step() -> None:
    a, b = (stack(RANK, 96, torch.float32),), (stack(48, RANK, torch.float32),)
    wrapper = grouped_wrapper(BATCHES["prefill"])
    for segments in BATCHES.values():
        _prepare(wrapper, segments)
        x = torch.randn(per_row(segments).numel(), 96)
        expected, actual = torch.zeros(2, len(x), 48)
        shipped_wrapper(segments).add_lora_linear(expected, x, a, b, 1.0, (48,))
        wrapper.add_lora_linear(actual, x, a, b, 1.0, (48,))
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_rows_must_match_the_plan() -> None:
    a, b = (stack(RANK, 96, torch.float32),), (stack(48, RANK, torch.float32),)
    with pytest.raises(ValueError, match="rows"):
        wrapper = grouped_wrapper([(0, 4)])
        wrapper.add_lora_linear(torch.zeros(5, 48), torch.zeros(5, 96), a, b, 1.0, (48,))


def test_base_rows_ignore_the_last_slot_and_broken_adapters() -> None:
    a, b = (stack(RANK, 96, torch.float32),), (stack(48, RANK, torch.float32),)
    # A diverged policy: its neighbours in the batch must not notice.
    a[0][-1], b[0][-1] = torch.nan, torch.inf
    segments = [(-1, 2), (SLOTS - 1, 1), (0, 3)]
    y = torch.zeros(6, 48)
    grouped_wrapper(segments).add_lora_linear(y, torch.randn(6, 96), a, b, 1.0, (48,))
    assert not y[:2].any()
    assert y[2].isnan().all()
    assert y[3:].isfinite().all() and y[3:].any()


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("counted", [True, False])
def test_reloaded_slot_is_noticed(which: str, counted: bool) -> None:
    """Overwrite a slot as vLLM's ``set_lora`` does: cleared, then copied into in place."""
    weights = {"a": stack(RANK, 96, torch.bfloat16), "b": stack(48, RANK, torch.bfloat16)}
    if not counted:  # tensors of inference mode have no version counter to watch
        weights = {name: one.clone() for name, one in weights.items()}
    segments = [(1, 4), (-1, 1), (2, 3)]
    wrapper, x = grouped_wrapper(segments), torch.randn(8, 96)

    def outputs(wrapper: Any) -> Tensor:
        y = torch.zeros(8, 48)
        wrapper.add_lora_linear(y, x, (weights["a"],), (weights["b"],), 1.0, (48,))
        return y

    first = outputs(wrapper)
    assert torch.equal(outputs(wrapper), first)
    weights[which][1] = 0
    weights[which][1, 0, :4].copy_(torch.randn_like(weights[which][1, 0, :4]))
    second = outputs(wrapper)
    torch.testing.assert_close(second, outputs(grouped_wrapper(segments)))
    assert not torch.allclose(second[:4], first[:4], atol=0.1)
    assert torch.equal(second[4:], first[4:])


def test_copies_are_reused_until_written(restored: pytest.MonkeyPatch) -> None:
    a, b = stack(RANK, 96, torch.bfloat16), stack(48, RANK, torch.bfloat16)
    copies = stacks.Presence((a,), (b,))
    copied: list[int] = []
    look = copies.look
    restored.setattr(copies, "look", lambda slot: (copied.append(slot), look(slot))[1])
    assert copies.refresh((1,)) and copies.refresh((1,))
    assert copied == [1]
    b[3, 0, :2, :2].copy_(torch.ones(2, 2))
    assert copies.refresh((1, 2))
    assert copied == [1, 1, 2]


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Undo an installation after the test."""
    for module in (lora_ops, torch_ops, punica_cpu):
        for name in OPERATIONS:
            monkeypatch.setattr(module, name, getattr(module, name))
    method = CpuPlatform.__dict__["get_punica_wrapper"]
    monkeypatch.setattr(CpuPlatform, "get_punica_wrapper", method)
    return monkeypatch


def is_shipped() -> bool:
    """Whether nothing of vLLM is replaced."""
    modules = (lora_ops, torch_ops, punica_cpu)
    own = all(getattr(m, name) is SHIPPED[name] for m in modules for name in SHIPPED)
    return own and CpuPlatform.get_punica_wrapper().endswith(".PunicaWrapperCPU")


def test_register_replaces_everything(restored: pytest.MonkeyPatch) -> None:
    from vllm.lora.punica_wrapper import get_punica_wrapper

    assert is_shipped()
    assert everloop_vllm.register() and everloop_vllm.register()
    for module in (lora_ops, torch_ops, punica_cpu):
        for name in SHIPPED:
            assert getattr(module, name) is getattr(grouped_ops, name)
    assert isinstance(get_punica_wrapper(16, 16, "cpu"), cpu_lora.GroupedPunicaWrapper)


def test_a_build_of_a_supported_version_is_supported(restored: pytest.MonkeyPatch) -> None:
    restored.setattr(vllm, "__version__", everloop_vllm.SUPPORTED_VLLM[0] + "+cpu")
    assert everloop_vllm.register()


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.33.0", "dev"])
def test_other_versions_stay_as_shipped(
    version: str, restored: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    restored.setattr(vllm, "__version__", version)
    restored.setattr(logging.getLogger("vllm"), "propagate", True)
    assert not everloop_vllm.register()
    assert is_shipped() and version in caplog.text and "WARNING" in caplog.text


def test_other_platforms_stay_as_shipped(restored: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    platform = SimpleNamespace(is_cpu=lambda: False, device_type="cuda")
    restored.setattr(vllm.platforms, "_current_platform", platform)
    restored.setattr(logging.getLogger("vllm"), "propagate", True)
    assert not everloop_vllm.register()
    assert is_shipped() and "cuda" in caplog.text and "WARNING" in caplog.text


def test_sampled_logits_are_as_shipped(segments: list[tuple[int, int]]) -> None:
    """One row per segment is sampled from."""
    a, b = stack(RANK, 24, torch.float32), stack(40, RANK, torch.float32)
    rows = torch.randn(len(segments), 24)
    outputs = []
    for wrapper in (shipped_wrapper(segments), grouped_wrapper(segments)):
        wrapper._sampler_indices = torch.tensor([slot for slot, _ in segments])
        wrapper.indices_len[1] = len(segments)
        outputs.append(torch.zeros(len(segments), 40))
        wrapper.add_lora_logits(outputs[-1], rows, a, b, 1.0)
    # vLLM's own takes -1 for its last slot, which is zero here.
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segments", [BATCHES["mixed"], BATCHES["prefill"]])
def test_prompt_logits_get_their_own_requests_adapter_beside_others(segments: list[tuple[int, int]]) -> None:
    """Their rows are a slice of the step's; as shipped the engine dies, or takes other adapters."""
    a, b = stack(RANK, 24, torch.float32), stack(40, RANK, torch.float32)
    wrapper = grouped_wrapper(segments)
    wrapper._sampler_indices = torch.tensor([slot for slot, _ in segments])
    wrapper.indices_len[1] = len(segments)
    hidden = torch.randn(sum(count for _, count in segments), 24)
    start = 0
    for slot, count in segments:
        rows = hidden[start : start + count]
        logits = torch.zeros(count, 40)
        wrapper.add_lora_logits(logits, rows, a, b, 0.5)
        expected = torch.zeros(count, 40) if slot < 0 else 0.5 * rows @ a[slot, 0].t() @ b[slot, 0].t()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        start += count


def test_prompt_logits_of_as_many_rows_as_are_sampled_are_not_mistaken_for_them() -> None:
    segments = [(0, 1), (3, 3), (1, 1)]
    a, b = stack(RANK, 24, torch.float32), stack(40, RANK, torch.float32)
    wrapper = grouped_wrapper(segments)
    wrapper._sampler_indices = torch.tensor([0, 3, 1])
    wrapper.indices_len[1] = 3
    hidden = torch.randn(5, 24)
    logits = torch.zeros(3, 40)
    wrapper.add_lora_logits(logits, hidden[1:4], a, b, 1.0)
    torch.testing.assert_close(logits, hidden[1:4] @ a[3, 0].t() @ b[3, 0].t(), rtol=1e-4, atol=1e-4)
