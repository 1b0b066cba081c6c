# SPDX-License-Identifier: Apache-2.0
"""The plug-in's wrapper against vLLM's own, in any mix of adapters and base rows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import everloop_vllm
import pytest
import torch
from everloop_vllm import compatibility, grouped_ops, row_stacks
from everloop_vllm.cpu_lora import GroupedPunicaWrapper
from everloop_vllm.row_stacks import RowStacks
from everloop_vllm.step_plan import MAX_PADDING, StepPlan
from torch import Tensor
from vllm.lora.punica_wrapper import punica_cpu
from vllm.platforms.cpu import CpuPlatform

SLOTS, RANK, INPUTS = 6, 16, 96
# Output widths of o_proj, of gate_up_proj and of a qkv_proj with grouped heads; whole panels of 16 lanes.
MODULES = [(32,), (64,), (96, 96), (96, 32, 32)]
TOLERANCE = {torch.bfloat16: 4e-2, torch.float32: 1e-4}
needs_own_code = pytest.mark.skipif(row_stacks.LIBRARY is None, reason="no C++ compiler was found at set-up")
WIDTHS = [lanes for lanes in (16, 8, 4) if lanes <= row_stacks.LANES]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Same numbers on every run, under the inference mode that vLLM serves in."""
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture(params=[*WIDTHS, "bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Dtype of weights and activations; bfloat16 by our own code, at each width of vectors, and by torch."""
    if isinstance(request.param, int):
        monkeypatch.setattr(row_stacks, "LANES", request.param)
    else:
        monkeypatch.setattr(row_stacks, "LIBRARY", None)
    return torch.float32 if request.param == "float32" else torch.bfloat16


class Module:
    """The stacked buffers of one layer, filled as vLLM's ``set_lora`` does."""

    def __init__(self, widths: tuple[int, ...], dtype: torch.dtype) -> None:
        self.widths, self.dtype = widths, dtype
        # Made outside inference mode, as vLLM makes them, so that they count their versions. The slot after the
        # last stays empty: as shipped, index -1 reads it.
        with torch.inference_mode(False):
            self.a = tuple(torch.zeros(SLOTS + 1, 1, RANK, INPUTS, dtype=dtype) for _ in widths)
            self.b = tuple(torch.zeros(SLOTS + 1, 1, width, RANK, dtype=dtype) for width in widths)

    def load(self, slot: int, rank: int = RANK) -> None:
        """Overwrite a slot in place with a random adapter."""
        for a, b in zip(self.a, self.b, strict=True):
            a[slot], b[slot] = 0, 0
            a[slot, 0, :rank].copy_(torch.randn(rank, INPUTS) / INPUTS**0.5)
            b[slot, 0, :, :rank].copy_(torch.randn(b.size(2), rank) / rank**0.5)

    def add(self, wrapper: Any, x: Tensor, y: Tensor, scale: float = 1.0, **kwargs: Any) -> Tensor:
        """Return what the wrapper makes of a copy of ``y``."""
        result = y.clone()
        wrapper.add_lora_linear(result, x, self.a, self.b, scale, self.widths, **kwargs)
        return result


def mapped(wrapper: Any, slots: list[int], *, is_prefill: bool = True) -> Any:
    """Give a wrapper the slot of each row."""
    # vLLM's adapter ids start at 1 and 0 means base; slot s holds adapter s + 1.
    ids = tuple(slot + 1 for slot in slots)
    mapping = SimpleNamespace(index_mapping=ids, prompt_mapping=ids, is_prefill=is_prefill)
    wrapper.update_metadata(mapping, list(range(1, SLOTS + 1)), SLOTS + 1, 1000)
    return wrapper


def grouped() -> GroupedPunicaWrapper:
    """Return this package's wrapper."""
    return GroupedPunicaWrapper(512, 512, "cpu")


def shipped() -> punica_cpu.PunicaWrapperCPU:
    """Return vLLM's own."""
    return punica_cpu.PunicaWrapperCPU(512, 512, "cpu")


def activations(rows: int, module: Module) -> tuple[Tensor, Tensor]:
    """Return the input and the base model's output of a layer."""
    return torch.randn(rows, INPUTS).to(module.dtype), torch.randn(rows, sum(module.widths)).to(module.dtype)


def bits(values: Tensor) -> Tensor:
    """Return the bits, by which the two zeros differ."""
    return values.contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32)


def random_step(seed: int) -> list[int]:
    """Return the slot of each row: single tokens and long runs, some adapters or all, base rows or none."""
    draw = random.Random(seed)
    usable = draw.sample(range(SLOTS), draw.randint(1, SLOTS)) + [-1] * draw.randint(0, 2)
    runs = [(draw.choice(usable), draw.choice([1, 1, 1, 2, 30])) for _ in range(draw.randint(1, 20))]
    return [slot for slot, rows in runs for _ in range(rows)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("widths", MODULES, ids=str)
def test_any_mix_equals_shipped(seed: int, widths: tuple[int, ...], dtype: torch.dtype) -> None:
    module, slots = Module(widths, dtype), random_step(seed)
    for slot in range(SLOTS):
        module.load(slot, rank=[16, 8, 1, 16, 4, 12][slot])
    scale = [1.0, 0.5][seed % 2]
    x, y = activations(len(slots), module)
    actual = module.add(mapped(grouped(), slots, is_prefill=seed % 3 > 0), x, y, scale)
    expected = module.add(mapped(shipped(), slots, is_prefill=seed % 3 > 0), x, y, scale)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    base = torch.tensor(slots) == -1
    assert base.all() or not torch.equal(actual, y)
    assert torch.equal(bits(actual[base]), bits(y[base]))


def test_no_rows(dtype: torch.dtype) -> None:
    module = Module((64,), dtype)
    # vLLM never maps an empty step; a step of base rows only leaves no work either.
    wrapper = mapped(grouped(), [-1])
    wrapper._plan = StepPlan.of(torch.empty(0, dtype=torch.long))
    x, y = activations(0, module)
    assert module.add(wrapper, x, y).shape == (0, 64)


def test_zeros_of_base_rows_keep_their_sign(dtype: torch.dtype) -> None:
    module = Module((64,), dtype)
    module.load(1)
    x, y = activations(3, module)
    y[:] = -0.0
    actual = module.add(mapped(grouped(), [-1, 1, -1]), x, y)
    assert torch.equal(bits(actual[::2]), bits(y[::2]))


@pytest.mark.parametrize("slots", [[2] * 4, [0, 2, 5, -1], [2, *[0] * 40]], ids=str)
@pytest.mark.parametrize("broken", ["a", "b"])
def test_a_broken_adapter_reaches_only_its_own(slots: list[int], broken: str, dtype: torch.dtype) -> None:
    module = Module((96, 32, 32), dtype)
    for slot in range(SLOTS):  # also those between the used ones
        module.load(slot)
    for slot in (1, 2, 3):
        (module.a if broken == "a" else module.b)[0][slot] = torch.nan
    x, y = activations(len(slots), module)
    actual = module.add(mapped(grouped(), slots), x, y)
    own = torch.tensor(slots) == 2
    assert actual[own][:, :96].isnan().all()
    assert actual[~own].isfinite().all()
    # Activations that diverged in one request stay there, too.
    x[own] = torch.inf
    assert module.add(mapped(grouped(), slots), x, y)[~own].isfinite().all()


def test_a_slot_overwritten_between_steps_is_served_anew(dtype: torch.dtype) -> None:
    """The mapping stays, so that nothing but the buffers tells: as when a name is loaded in place."""
    module = Module((96, 96), dtype)
    module.load(0), module.load(3)
    wrapper, slots = mapped(grouped(), [0, 3, -1, 3]), [0, 3, -1, 3]
    x, y = activations(4, module)
    first = module.add(wrapper, x, y)
    module.load(3)
    second = module.add(wrapper, x, y)
    expected = module.add(mapped(shipped(), slots), x, y)
    torch.testing.assert_close(second, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(second[[0, 2]], first[[0, 2]]) and not torch.allclose(
        second[[1, 3]], first[[1, 3]], atol=0.1
    )
    module.b[1][3] = 0  # of one slice alone
    third = module.add(wrapper, x, y)
    assert torch.equal(third[:, :96], second[:, :96]) and torch.equal(third[1, 96:], y[1, 96:])
    for buffer in (*module.a, *module.b):
        buffer[3] = 0  # unloaded; slot 0 still adds something
    assert torch.equal(module.add(wrapper, x, y)[0], second[0])
    assert torch.equal(module.add(wrapper, x, y)[[1, 3]], y[[1, 3]])
    module.load(3)
    assert not torch.equal(module.add(wrapper, x, y)[[1, 3]], y[[1, 3]])


def test_a_callers_buffer_gets_the_hidden_products(dtype: torch.dtype) -> None:
    module, slots = Module((96, 96), dtype), [1, -1, 4, 1]
    module.load(1), module.load(4)
    x, y = activations(4, module)
    buffers = [tuple(torch.zeros(4, RANK) for _ in module.widths) for _ in range(2)]
    actual = module.add(mapped(grouped(), slots), x, y, buffer=buffers[0])
    expected = module.add(mapped(shipped(), slots), x, y, buffer=buffers[1])
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert buffers[0][0].any()
    torch.testing.assert_close(buffers[0], buffers[1], atol=1e-2, rtol=1e-2)


@needs_own_code
def test_what_our_own_code_does_not_take_is_left_to_torch() -> None:
    def fits(widths: tuple[int, ...], inputs: int, rank: int = 8, dtype: torch.dtype = torch.bfloat16) -> bool:
        a = tuple(torch.zeros(2, 1, rank, inputs, dtype=torch.bfloat16) for _ in widths)
        b = tuple(torch.zeros(2, 1, width, rank, dtype=torch.bfloat16) for width in widths)
        return RowStacks.fits(a, b, {torch.bfloat16, dtype})

    assert fits((64, 32), 96) and fits((64,), 96, rank=1) and fits((64, 64), 96, rank=256)
    assert not fits((64, 90), 96) and not fits((64,), 90)
    assert not fits((64, 64), 96, rank=257) and not fits((64,), 96, dtype=torch.float32)


@needs_own_code
@pytest.mark.parametrize("lanes", WIDTHS)
@pytest.mark.parametrize("rank", [1, 8, 20, 64])
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 100])
def test_our_own_code_rounds_once(rows: int, rank: int, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide inputs are read in several chunks, ranks are filled up, rows are served in blocks by two threads."""
    monkeypatch.setattr(row_stacks, "LANES", lanes)
    inputs, widths = 1040, (48, 16)
    a = tuple(torch.randn(2, 1, rank, inputs).bfloat16() for _ in widths)
    b = tuple(torch.randn(2, 1, width, rank).bfloat16() for width in widths)
    x, y = torch.randn(rows, inputs).bfloat16(), torch.randn(rows, sum(widths)).bfloat16()
    slots = torch.arange(rows) % 3 - 1 if rows > 1 else torch.ones(1, dtype=torch.long)
    expected = y.double()
    for slot in (0, 1):
        own = slots == slot
        products = [x[own].double() @ a[s][slot, 0].double().t() @ b[s][slot, 0].double().t() for s in (0, 1)]
        expected[own] += 0.5 * torch.cat(products, 1)
    copies = RowStacks(a, b)
    copies.refresh((0, 1))
    copies.add(y, x, StepPlan.of(slots), 0.5)
    # Half a unit in the last place of bfloat16, and what float32 sums of some thousand terms may be off.
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=2e-3)


@needs_own_code
def test_our_own_code_rounds_to_even_and_keeps_what_is_no_number() -> None:
    a, b = torch.zeros(1, 1, 1, 16).bfloat16(), torch.zeros(1, 1, 64, 1).bfloat16()
    a[..., 0] = 1
    y = (
        torch.tensor([1.0, 1.0078125, -1.0, 0.0, torch.inf, -torch.inf, torch.nan, 3.3895e38] * 8)
        .bfloat16()
        .view(1, 64)
    )
    for unit in (2.0**-8, 2.0**-9, -(2.0**-8), 2.0**120, torch.inf, torch.nan):
        b[:] = unit
        actual, x = y.clone(), torch.zeros(1, 16).bfloat16()
        x[0, 0] = 1
        copies = RowStacks((a,), (b,))
        copies.refresh((0,))
        copies.add(actual, x, StepPlan.of(torch.zeros(1, dtype=torch.long)), 1.0)
        expected = (y.float() + b[0, 0, :, 0].float()).bfloat16()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_rows_that_do_not_lie_side_by_side(dtype: torch.dtype) -> None:
    module, slots = Module((64,), dtype), [0, -1, 0]
    module.load(0)
    wrapper = mapped(grouped(), slots)
    x, y = activations(3, module)
    expected = module.add(wrapper, x, y)
    turned, result = x.t().contiguous().t(), y.t().contiguous().t()
    wrapper.add_lora_linear(result, turned, module.a, module.b, 1.0, module.widths)
    assert torch.equal(bits(result), bits(expected))
    wide_x, wide_y = torch.cat([x, x], 1), torch.cat([y, y], 1)
    wrapper.add_lora_linear(wide_y[:, 64:], wide_x[:, INPUTS:], module.a, module.b, 1.0, module.widths)
    assert torch.equal(bits(wide_y), bits(torch.cat([y, expected], 1)))


def test_activations_of_another_dtype_get_copies_of_their_own() -> None:
    module, slots = Module((64,), torch.bfloat16), [0, 0]
    module.load(0)
    wrapper = mapped(grouped(), slots)
    for dtype in (torch.bfloat16, torch.float32):
        x, y = (values.to(dtype) for values in activations(2, module))
        expected = module.add(mapped(shipped(), slots), x, y)
        torch.testing.assert_close(module.add(wrapper, x, y), expected, atol=4e-2, rtol=4e-2)


@pytest.mark.parametrize("seed", range(20))
def test_plan_holds_every_row_once(seed: int) -> None:
    slots = random_step(seed)
    plan = StepPlan.of(torch.tensor(slots))
    adapted = [row for row, slot in enumerate(slots) if slot >= 0]
    if plan.gather is None:
        assert not adapted or (adapted == list(range(len(slots))) and len(set(slots)) == 1)
        return
    assert plan.scatter is not None and plan.gather.numel() <= MAX_PADDING * len(adapted)
    for block in plan.blocks:
        served = range(*block.slots)
        each = (block.stop - block.start) // len(served)
        for row in adapted:
            position = int(plan.scatter[row])
            if block.start <= position < block.stop:
                assert served[(position - block.start) // each] == slots[row]
                assert plan.gather[position] == row
    ends = plan.scatter[torch.tensor(slots) == -1]
    assert (ends == plan.gather.numel()).all()


def test_the_output_head_costs_nothing_unless_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    module, slots = Module((64,), torch.float32), [0, 1, -1]
    calls: list[int] = []
    product = grouped_ops.bgmv_expand
    monkeypatch.setattr(grouped_ops, "bgmv_expand", lambda *a, **k: (calls.append(1), product(*a, **k)))
    x, y = activations(3, module)

    def logits(wrapper: Any) -> Tensor:
        result = y.clone()
        wrapper.add_lora_logits(result, x, module.a[0], module.b[0], 1.0)
        return result

    wrapper = mapped(grouped(), slots)
    assert torch.equal(bits(logits(wrapper)), bits(y)) and not calls
    module.load(1)
    actual = logits(wrapper)
    assert calls and torch.equal(actual[[0, 2]], y[[0, 2]])
    torch.testing.assert_close(actual, logits(mapped(shipped(), slots)), atol=1e-4, rtol=1e-4)
    module.b[0][1], module.a[0][1] = 0, torch.nan
    assert logits(wrapper)[1].isnan().all()
    # Index -1 would read the last slot.
    module.b[0][-1] = 1
    mapped(wrapper, [0, -1, -1])
    calls.clear()
    assert torch.equal(logits(wrapper), y) and not calls


@pytest.mark.parametrize("is_prefill", [True, False])
def test_the_other_methods_equal_shipped(is_prefill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings, and the halves that sharded layers call one by one, under an installed plug-in."""
    module, slots = Module((96, 32, 32), torch.float32), [3, -1, 0, 0, 3]
    module.load(0), module.load(3)
    x, y = activations(5, module)
    hidden = torch.randn(5, RANK)

    def run(wrapper: Any) -> list[Tensor]:
        mapped(wrapper, slots, is_prefill=is_prefill)
        embedded, expanded, shrunk = y[:, :96].clone(), y.clone(), torch.zeros(3, 5, RANK)
        wrapper.add_lora_embedding(embedded, hidden, module.b[0], add_input=True)
        wrapper.add_shrink(shrunk, x, module.a, 0.5)
        wrapper.add_expand(expanded, shrunk, module.b, module.widths, offset_start=0, add_input=True)
        return [embedded, shrunk, expanded]

    expected = run(shipped())
    for name in compatibility.OPERATIONS:
        monkeypatch.setattr(punica_cpu, name, getattr(everloop_vllm.grouped_ops, name))
    for actual, wanted in zip(run(grouped()), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (punica_cpu, "bgmv_shrink"),
        (punica_cpu.PunicaWrapperCPU, "add_lora_linear"),
        (punica_cpu.PunicaWrapperCPU, "sampler_indices"),
        (CpuPlatform, "get_punica_wrapper"),
    ],
)
@pytest.mark.parametrize("how", ["gone", "other"])
def test_a_vllm_that_differs_stays_as_shipped(
    where: Any, name: str, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(where, name, None if how == "gone" else lambda something, new: None)
    before = vars(CpuPlatform)["get_punica_wrapper"]
    assert compatibility.mismatch() is not None
    assert not everloop_vllm.register()
    assert vars(CpuPlatform)["get_punica_wrapper"] is before
    assert name in caplog.text and "WARNING" in caplog.text
