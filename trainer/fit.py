"""Which rows fit: TRL would leave out, without a word, those whose prompts leave no room for an answer."""

from __future__ import annotations

from pathlib import Path

from trainer.recipe import Messages, Rows

MIN_ANSWER_TOKENS = 8


def fitting(rows: Rows, model_dir: Path, max_row_tokens: int) -> Rows:
    """Return the rows whose prompts leave room to learn from an answer; the others are counted."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def fits(messages: Messages) -> bool:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        num_tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return num_tokens + MIN_ANSWER_TOKENS <= max_row_tokens

    return rows.only([n for n, row in enumerate(rows.rows) if fits(row["prompt"])], "prompt_too_long")
