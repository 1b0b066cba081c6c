"""The base model as encoder: the hidden states that it has of an answer anyway.

Content is the mean over the answer's tokens of the states that enter one middle layer, normalised as that layer
would (its own RMSNorm tames the few huge dimensions). The prompt's part is the same mean over the prompt's tokens,
projected. No adapter that is served is ever on, so features stay comparable over releases.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.errors import SetupError
from infra.weights import base_model_digest, files_digest
from reward.encoder import (
    BATCH_ANSWERS,
    RECIPE,
    Answer,
    Encoder,
    check_digest,
    projection,
)

# The prompt's window does not depend on the answer's length: else answers to one prompt would differ in its part.
PROMPT_TOKENS = 512
ANSWER_TOKENS = 1024
# With these each part varies by about 1 in all (sum of variances, over 160 answers to 160 prompts).
CONTENT_SCALE = 10.0
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
PROMPT_SCALE = 100.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token ids of prompt and answer together, and how many are the answer's."""

    ids: list[int]
    num_answer: int


class BaseModelEncoder(Encoder):
    """Mean hidden states of the base model.

    Parameters
    ----------
    model_dir
        Directory of the base model.
    layer
        Number of layers whose output is used; the rest of the model is not kept in memory.
    num_threads
        Threads that torch may use in this process; its own choice, if unset.
    adapter_dir
        A LoRA adapter (PEFT) of the reward model's own, merged into the weights: its digest is part of the name.

    An answer is seen up to its first :data:`ANSWER_TOKENS` tokens, a prompt from its last :data:`PROMPT_TOKENS`.
    """

    def __init__(
        self, model_dir: Path, layer: int, num_threads: int | None = None, adapter_dir: Path | None = None
    ) -> None:
        self.model_dir = model_dir
        self.layer = layer
        self.adapter_dir = adapter_dir
        self._digest = base_model_digest(model_dir)
        hidden_size = int(json.loads((model_dir / "config.json").read_text())["hidden_size"])
        parts = [self._digest[:16], f"layer{layer}"]
        if adapter_dir is not None:
            self._adapter_digest = adapter_digest(adapter_dir)
            parts.append(f"adapter-{self._adapter_digest[:16]}")
        super().__init__(".".join([*parts, RECIPE]), hidden_size, num_threads)
        self._projection = projection(hidden_size)
        self._tokenizer: Any = None
        self._body: Any = None
        self._norm: Any = None

    def _load(self) -> None:
        import torch
        from transformers import AutoTokenizer

        check_digest(self.model_dir, self._digest)
        self._tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        model = _open_model(self.model_dir, self.adapter_dir)
        if self.layer >= len(model.model.layers):
            raise SetupError(
                f"The base model has {len(model.model.layers)} layers; encoder_layer={self.layer} is too deep.",
                code="encoder_layer_too_deep",
            )
        self._norm = model.model.layers[self.layer].input_layernorm
        # Before the adapter comes: one that was trained on these layers alone lacks nothing then.
        model.model.layers = model.model.layers[: self.layer]
        model.model.norm = torch.nn.Identity()
        if self.adapter_dir is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, self.adapter_dir).merge_and_unload()
        self._body = model.model.eval()

    def _num_tokens(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _embed(self, answers: Sequence[Answer]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        # Batched by length, so that little time goes into padding.
        tokens = [self._tokens(answer) for answer in answers]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i].ids))
        pooled = np.empty((2, len(tokens), self.layout.content), dtype=np.float32)
        for start in range(0, len(order), BATCH_ANSWERS):
            chosen = order[start : start + BATCH_ANSWERS]
            pooled[:, chosen] = self._pooled([tokens[i] for i in chosen])
        content, prompt = pooled / np.sqrt(self.layout.content)
        return CONTENT_SCALE * content, (PROMPT_SCALE * prompt @ self._projection).astype(np.float32)

    def _tokens(self, answer: Answer) -> Tokens:
        messages, reply = answer
        text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        prompt_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"][-PROMPT_TOKENS:]
        reply_ids = self._tokenizer(reply, add_special_tokens=False)["input_ids"][: ANSWER_TOKENS - 1]
        reply_ids = [*reply_ids, self._tokenizer.eos_token_id]
        return Tokens(prompt_ids + reply_ids, len(reply_ids))

    def _pooled(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """Return the mean states of the answers and of the prompts, shape ``(2, batch, hidden)``."""
        import torch

        longest = max(len(tokens.ids) for tokens in batch)
        ids = torch.full((len(batch), longest), self._tokenizer.eos_token_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens.ids)] = torch.tensor(tokens.ids)
            mask[row, : len(tokens.ids)] = 1
        with torch.inference_mode():
            states = self._norm(self._body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state)
            means: list[list[Any]] = [[], []]
            for row, tokens in enumerate(batch):
                start, end = len(tokens.ids) - tokens.num_answer, len(tokens.ids)
                means[0].append(states[row, start:end].float().mean(0))
                means[1].append(states[row, :start].float().mean(0))
            return torch.stack([torch.stack(rows) for rows in means]).numpy()  # type: ignore[no-any-return]


def _open_model(model_dir: Path, adapter_dir: Path | None) -> Any:
    """Return the base model in bfloat16, as what the adapter was made for.

    The adapter of a reward model (task type ``SEQ_CLS``) carries the score head that it was trained under; that is
    loaded with it, and left behind.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = {} if adapter_dir is None else json.loads((adapter_dir / "adapter_config.json").read_text())
    if config.get("task_type") == "SEQ_CLS":
        return AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1, dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)


def adapter_digest(adapter_dir: Path) -> str:
    """Return the SHA-256 over an adapter's weights and configuration."""
    paths = [adapter_dir / name for name in ADAPTER_FILES]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise SetupError(
            f"{adapter_dir} is no adapter: it lacks {' and '.join(missing)}.", code="reward_adapter_incomplete"
        )
    return files_digest(paths)
