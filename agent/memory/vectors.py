"""Vectors of words, by which a question finds what was said in other words: the input layer of a sentence model.

Only a table is read, and no model is run: a word is looked up in microseconds, without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from infra import sentence_model
from infra.settings import Settings

TABLES = ("word_embeddings.weight", "embed_tokens.weight", "embeddings")
COMMON = 3  # directions that all words share, and that say nothing of any (Mu and Viswanath, 2018)
DIM = 128  # directions kept: as good as all 384 where it was measured
MAX_KEPT = 100_000
MAX_VOCABULARY = 12_000
NUM_NEAR, LEAST_NEAR = 8, 0.4

Vectors = NDArray[np.float32]


class WordVectors:
    """Vectors of length 1 for words.

    Parameters
    ----------
    model_dir
        A model with ``tokenizer.json`` and a table of embeddings in safetensors that NumPy reads.
    """

    def __init__(self, model_dir: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._table = _directions(_embeddings(model_dir))
        self._known: dict[int, Vectors] = {}
        self._near: dict[int, list[tuple[str, float]]] = {}
        whole = [(at, word) for word, at in self._tokenizer.get_vocab().items() if word.isalpha() and len(word) > 2]
        whole.sort()  # the common words come first
        self._vocabulary = [word for _, word in whole[:MAX_VOCABULARY]]
        self._of_vocabulary = self._table[[at for at, _ in whole[:MAX_VOCABULARY]]]

    def of(self, words: Sequence[str]) -> Vectors:
        """Return the vectors of words, shape (n, DIM); what is kept from call to call are hashes of them."""
        if len(self._known) > MAX_KEPT:
            self._known.clear()
        keys = [hash(word) for word in words]
        for key, word in zip(keys, words, strict=True):
            if key not in self._known:
                ids = self._tokenizer.encode(word, add_special_tokens=False).ids
                self._known[key] = _unit(self._table[ids].mean(axis=0) if ids else np.zeros(DIM, np.float32))
        return np.array([self._known[key] for key in keys], np.float32).reshape(len(words), -1)

    def near(self, words: Sequence[str]) -> list[list[tuple[str, float]]]:
        """Return for each word the common words that are nearest to it, and how near they are (cosine)."""
        if len(self._near) > MAX_KEPT:
            self._near.clear()
        unknown = [word for word in dict.fromkeys(words) if hash(word) not in self._near]
        if unknown:
            nearness = self.of(unknown) @ self._of_vocabulary.T
            for word, row in zip(unknown, nearness, strict=True):
                best = np.argpartition(-row, NUM_NEAR)[:NUM_NEAR]
                self._near[hash(word)] = [
                    (self._vocabulary[at], float(row[at])) for at in best if row[at] > LEAST_NEAR
                ]
        return [self._near[hash(word)] for word in words]


def of_settings(settings: Settings) -> WordVectors | None:
    """Return the vectors of the sentence model that is installed or named; None without one."""
    directory = sentence_model.find(settings)
    if directory is None or not (directory / "tokenizer.json").is_file():
        return None
    try:
        return WordVectors(directory)
    except (SafetensorError, FileNotFoundError, TypeError):  # a format that NumPy does not know
        return None


def _embeddings(model_dir: Path) -> Vectors:
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name.endswith(TABLES):
                    return np.asarray(tensors.get_tensor(name), np.float32)
    raise FileNotFoundError(f"{model_dir} has no table of embeddings in safetensors.")


def _directions(table: Vectors) -> Vectors:
    """Return the table in its leading directions, without those that are common to all words."""
    table = table - table.mean(axis=0)
    _, directions = np.linalg.eigh(table.T @ table)  # the largest come last
    dim = min(DIM, table.shape[1] - COMMON)
    return np.asarray(_unit(table @ directions[:, -COMMON - dim : -COMMON]), np.float32)


def _unit(rows: Vectors) -> Vectors:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-6), np.float32)
