"""Whether an adapter is one that the engine can serve on the present base model: its configuration and its tensors.

Nothing of it is run, and no model is loaded: the base model's shapes are read from the headers of its weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, deserialize, safe_open

from deploy.adapter_files import CONFIG, WEIGHTS
from infra.errors import IntegrityError
from infra.weights import weight_files

Shape = tuple[int, ...]
MAX_CONFIG_BYTES = 1024**2
_TENSOR = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<side>[AB])\.weight")
_PREFIX = re.compile(r"^(?:(?:base_model|model|transformer|language_model)\.)+")
# Names of modules, as people write them and as PEFT writes them for experts: nothing that takes long to match.
_PLAIN_PATTERN = re.compile(r"(?:\.\*\\\.)?[\w.\-]+")
_EXPERTS = ".experts"
# dtype: (as numpy reads it, the exponent's bits); all of them set is an infinity or no number.
_DTYPES = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}


class AdapterConfig(BaseModel):
    """PEFT's adapter_config.json, as far as the engine serves it.

    What is not named here is a variant of LoRA, or reaches beyond the adapter: it must be unset.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    r: int = Field(ge=1)
    lora_alpha: float = Field(gt=0)
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | Literal["all-linear"] | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: Literal["none"] = "none"
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] | None = True
    lora_dropout: float = 0.0
    inference_mode: bool = True
    base_model_name_or_path: str | None = None
    revision: str | None = None
    peft_version: str | None = None
    megatron_core: Literal["megatron.core"] | None = None
    qalora_group_size: int | None = None

    def rank_of(self, module: str) -> int:
        """Return the rank that PEFT and the engine give a module."""
        name = module
        if module.endswith(f"{_EXPERTS}.base_layer"):  # how PEFT stores the two parameters of fused experts
            name = module.removesuffix(".base_layer") + ".gate_up_proj"
        elif module.endswith(_EXPERTS):
            name = f"{module}.down_proj"
        for pattern, rank in (self.rank_pattern or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                return rank
        return self.r

    def targets(self, module: str) -> bool:
        """Tell whether a module is among those that the configuration names."""
        if _EXPERTS in module or self.target_modules == "all-linear":
            return True
        names = [*(self.target_modules or []), *(self.target_parameters or [])]
        return any(f".{module}".endswith(f".{name.removesuffix('.weight')}") for name in names)


@dataclass(frozen=True, slots=True)
class BaseShapes:
    """Shapes of the base model's weights, under names without what models put before their layers."""

    weights: Mapping[str, frozenset[Shape]]
    sizes: frozenset[int]

    @classmethod
    def read(cls, model_dir: Path) -> BaseShapes:
        """Read them from the headers of the weights.

        Raises
        ------
        SetupError
            Code ``model_weights_missing``.
        """
        found: dict[str, set[Shape]] = defaultdict(set)
        for path in weight_files(model_dir):
            for name, shape, _ in _tensors(path):
                found[_place(name.removesuffix(".weight"))].add(shape)
        sizes = {size for shapes in found.values() for shape in shapes for size in shape}
        return cls({name: frozenset(shapes) for name, shapes in found.items()}, frozenset(sizes))

    def fits(self, module: str, num_in: int, num_out: int, transposed: bool) -> bool:
        """Tell whether the base model has such a module, with so many inputs and outputs."""
        if _EXPERTS in module:  # checkpoints store them one by one or together
            return all(size in self.sizes or size / 2 in self.sizes for size in (num_in, num_out))
        wanted = (num_in, num_out) if transposed else (num_out, num_in)
        return wanted in self.weights.get(_place(module), frozenset())


def check_adapter(directory: Path, base: BaseShapes, max_rank: int) -> None:
    """Check that the engine can serve an adapter on the base model.

    Raises
    ------
    IntegrityError
        Codes ``adapter_config_invalid``, ``adapter_unsafe``, ``adapter_unsupported``, ``adapter_rank_too_large``,
        ``adapter_damaged``, ``adapter_incomplete``, ``adapter_of_another_base``, ``adapter_not_finite``.
    """
    config = read_config(directory / CONFIG)
    largest = max([config.r, *(config.rank_pattern or {}).values()])
    if largest > max_rank:
        raise IntegrityError(
            f"The adapter has rank {largest}, and the engine takes at most max_lora_rank = {max_rank}. Train a "
            "smaller one, or raise the setting and start the engine again.",
            code="adapter_rank_too_large",
        )
    _check_shapes(directory / WEIGHTS, config, base)
    _check_finite(directory / WEIGHTS)


def read_config(path: Path) -> AdapterConfig:
    """Read an adapter's configuration.

    Raises
    ------
    IntegrityError
        Code ``adapter_config_invalid`` for what is none, ``adapter_unsafe`` for what would import or run something,
        ``adapter_unsupported`` for a variant that the engine does not serve.
    """
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise IntegrityError(f"{CONFIG} is larger than 1 MiB.", code="adapter_config_invalid")
    try:
        config = AdapterConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise IntegrityError(
            f"{CONFIG} is none that can be served: {where}: {first['msg']}.", code="adapter_config_invalid"
        ) from error
    more = {name for name, value in (config.model_extra or {}).items() if value}
    if "auto_mapping" in more:
        raise IntegrityError(
            f"{CONFIG} has an auto_mapping: it would import code. Save the adapter of a plain model.",
            code="adapter_unsafe",
        )
    if more:
        raise IntegrityError(
            f"The engine serves plain LoRA only, and {CONFIG} sets {', '.join(sorted(more))}. Merge or train it "
            "without.",
            code="adapter_unsupported",
        )
    _check_patterns(config)
    return config


def _check_patterns(config: AdapterConfig) -> None:
    odd = [name for name in (config.rank_pattern or {}) if not _PLAIN_PATTERN.fullmatch(name)]
    if odd:
        raise IntegrityError(
            f"rank_pattern has the regular expression {odd[0][:80]!r}; only plain names of modules are taken.",
            code="adapter_unsupported",
        )
    if any(rank < 1 for rank in (config.rank_pattern or {}).values()):
        raise IntegrityError("rank_pattern has a rank below 1.", code="adapter_config_invalid")


def _check_shapes(path: Path, config: AdapterConfig, base: BaseShapes) -> None:
    pairs: dict[str, dict[str, Shape]] = defaultdict(dict)
    for name, shape, dtype in _tensors(path):
        match = _TENSOR.fullmatch(name)
        if match is None or len(shape) != 2 or dtype not in _DTYPES:
            raise IntegrityError(
                f"{name} ({dtype}, {list(shape)}) is no lora_A or lora_B of a linear layer in float32, float16 or "
                "bfloat16; the engine serves nothing else.",
                code="adapter_unsupported",
            )
        pairs[match["module"]][match["side"]] = shape
    if not pairs:
        raise IntegrityError(f"{WEIGHTS} holds no tensors.", code="adapter_incomplete")
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise IntegrityError(f"{module} has no lora_{'AB'['A' in pair]}.", code="adapter_incomplete")
        _check_pair(module, pair["A"], pair["B"], config, base)


def _check_pair(module: str, a: Shape, b: Shape, config: AdapterConfig, base: BaseShapes) -> None:
    rank = config.rank_of(module)
    whole = a[0] % rank == 0 if _EXPERTS in module else a[0] == rank
    if a[0] != b[1] or not whole or not config.targets(module):
        raise IntegrityError(
            f"{CONFIG} does not describe these weights: {module} has lora_A {list(a)} and lora_B {list(b)}, where "
            f"rank {rank} was told. The two files are of different adapters.",
            code="adapter_config_invalid",
        )
    if not base.fits(module, a[1], b[0], config.fan_in_fan_out):
        raise IntegrityError(
            f"The base model has no {module} with {a[1]} inputs and {b[0]} outputs: the adapter was trained on "
            "another one. Train it on this one, or set base_model to its own.",
            code="adapter_of_another_base",
        )


def _check_finite(path: Path) -> None:
    for name, tensor in deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
        kind, exponent = _DTYPES[tensor["dtype"]]
        bits = np.frombuffer(tensor["data"], kind)
        if (bits & exponent == exponent).any():
            raise IntegrityError(
                f"{name} holds infinities or what is no number: the training went wrong. A lower learning_rate "
                "may help.",
                code="adapter_not_finite",
            )


def _tensors(path: Path) -> Iterator[tuple[str, Shape, str]]:
    """Yield name, shape and dtype of each tensor, from the header alone."""
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = file.get_slice(name)
                yield name, tuple(tensor.get_shape()), tensor.get_dtype()
    except SafetensorError as error:
        raise IntegrityError(
            f"{path.name} is no whole safetensors file: {error}", code="adapter_damaged"
        ) from error


def _place(module: str) -> str:
    """Return where a module stands, whatever the model around its layers is called."""
    at = module.find("layers.")
    return module[at:] if at >= 0 else _PREFIX.sub("", module)
