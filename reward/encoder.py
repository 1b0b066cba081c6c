"""Features of an answer: the frozen base model's hidden states, and the answer's style.

The hidden part is the mean over the answer's tokens of the states that enter one middle layer, normalised
as that layer would (its own RMSNorm tames the few huge dimensions). The adapter is never on, so features
stay comparable over releases and are cached for good.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reward.style import style_features

Message = dict[str, Any]
BATCH_ANSWERS = 8
MAX_TOKENS = 1024
# Bring both parts to about unit variance, so that a prior variance of 1 suits either.
HIDDEN_SCALE = 10.0
STYLE_SCALE = 0.7


class Encoder:
    """Turns answers in context into feature vectors.

    Parameters
    ----------
    model_dir
        Directory of the base model.
    layer
        Number of layers whose output is used; the rest of the model is not loaded into memory.
    num_threads
        Threads that torch may use in this process; its own choice, if unset.

    The model is loaded when it is first needed (or by :meth:`load`): a worker that finds its features in the cache
    is back at work a second after it was killed.
    """

    def __init__(self, model_dir: Path, layer: int, num_threads: int | None = None) -> None:
        self.model_dir = model_dir
        self.layer = layer
        self.num_threads = num_threads
        self.hidden_size = int(json.loads((model_dir / "config.json").read_text())["hidden_size"])
        self.name = encoder_name(model_dir, layer)
        self._body: Any = None
        self._loading = threading.Lock()

    def load(self) -> None:
        """Load the model, unless it is loaded; safe to call from a thread that does nothing else."""
        with self._loading:
            if self._body is None:
                self._load()

    def _load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        layer = self.layer
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        model = AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=torch.bfloat16)
        if layer >= len(model.model.layers):
            raise ValueError(f"The base model has {len(model.model.layers)} layers; layer {layer} is too deep.")
        self._norm = model.model.layers[layer].input_layernorm
        model.model.layers = model.model.layers[:layer]
        model.model.norm = torch.nn.Identity()
        self._body = model.model.eval()

    @property
    def dim(self) -> int:
        """Number of features: hidden, style and a constant."""
        return self.hidden_size + len(style_features("")) + 1

    def encode(self, answers: Sequence[tuple[Sequence[Message], str]]) -> NDArray[np.float32]:
        """Return features of (messages, answer) pairs, shape ``(n, dim)``.

        Answers are batched by length, so that little time goes into padding.
        """
        self.load()
        tokens = [self._tokens(messages, answer) for messages, answer in answers]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i][0]))
        hidden = np.zeros((len(tokens), self.hidden_size), dtype=np.float32)
        for start in range(0, len(order), BATCH_ANSWERS):
            chosen = order[start : start + BATCH_ANSWERS]
            hidden[chosen] = self._pooled([tokens[i] for i in chosen])
        style = np.array([style_features(answer) for _, answer in answers], dtype=np.float32)
        hidden *= HIDDEN_SCALE / np.sqrt(hidden.shape[1])
        style *= STYLE_SCALE
        return np.concatenate([hidden, style, np.ones((len(tokens), 1), np.float32)], axis=1)

    def _tokens(self, messages: Sequence[Message], answer: str) -> tuple[list[int], int]:
        """Return the token ids (prompt cut from the left) and the number of tokens of the answer."""
        text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        prompt = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        end = [self.tokenizer.eos_token_id]
        reply = self.tokenizer(answer, add_special_tokens=False)["input_ids"][: MAX_TOKENS - 2] + end
        return prompt[-(MAX_TOKENS - len(reply)) :] + reply, len(reply)

    def _pooled(self, batch: Sequence[tuple[list[int], int]]) -> NDArray[np.float32]:
        import torch

        longest = max(len(ids) for ids, _ in batch)
        ids = torch.full((len(batch), longest), self.tokenizer.eos_token_id)
        mask = torch.zeros_like(ids)
        for row, (tokens, _) in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        with torch.inference_mode():
            states = self._norm(self._body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state)
        rows = [
            states[row, len(tokens) - length : len(tokens)].mean(0) for row, (tokens, length) in enumerate(batch)
        ]
        return torch.stack(rows).float().numpy()  # type: ignore[no-any-return]


def encoder_name(model_dir: Path, layer: int) -> str:
    """Return the cache key of an encoder: base model digest, layer, and the version of this file's recipe."""
    return f"{base_model_digest(model_dir)[:16]}.layer{layer}.v2"


def base_model_digest(model_dir: Path) -> str:
    """Return the SHA-256 over the model's weight files, remembered beside them."""
    note = model_dir / "everloop.json"
    if note.exists():
        return str(json.loads(note.read_text())["sha256"])
    digest = hashlib.sha256()
    for path in sorted(model_dir.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
