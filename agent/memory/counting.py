"""Counting tokens as the engine counts them: its tokenizer and its chat template, without its libraries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from agent.memory.words import Piece
from infra.errors import InvalidRequestError, SetupError

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
MAX_WORDS = 200_000  # whose lengths are kept
MAX_TEXTS = 20_000  # the lengths of whose pieces are kept


class Counter:
    """Counts the tokens of prompts of one model.

    Parameters
    ----------
    model_dir
        The model's directory, with ``tokenizer.json`` and its chat template.

    Raises
    ------
    SetupError
        Code ``tokenizer_missing``, where one of them is not there.
    """

    def __init__(self, model_dir: Path) -> None:
        tokenizer = model_dir / "tokenizer.json"
        config_file = model_dir / "tokenizer_config.json"
        if not tokenizer.is_file():
            raise SetupError(
                f"{model_dir} has no tokenizer.json. Name a model that has one.", code="tokenizer_missing"
            )
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = json.loads(config_file.read_text()) if config_file.is_file() else {}
        self._template = _template(model_dir, config)
        self._special = {name: _content(config.get(name)) for name in SPECIAL}
        self._words: dict[int, int] = {}
        self._pieces: dict[int, tuple[list[int], list[int]]] = {}

    def text(self, text: str) -> int:
        """Return how many tokens a text is by itself."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def words(self, words: Sequence[str]) -> list[int]:
        """Return about how many tokens each word is within a text, a space before it.

        Exact where the tokenizer begins anew at a space, as most do. What is kept from call to call are hashes.
        """
        keys = [hash(word) for word in words]
        unknown = {key: word for key, word in zip(keys, words, strict=True) if key not in self._words}
        if unknown:
            if len(self._words) > MAX_WORDS:
                self._words.clear()
                unknown = dict(zip(keys, words, strict=True))
            self._words.update(zip(unknown, self._lengths(list(unknown.values())), strict=True))
        return [self._words[key] for key in keys]

    def pieces(self, text: str, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
        """Return the lengths of a text's pieces as they stand, and of what is in them; kept by its hash."""
        key = hash(text)
        if key not in self._pieces:
            if len(self._pieces) > MAX_TEXTS:
                self._pieces.clear()
            whole = self.words([text[piece.start : piece.end] for piece in pieces])
            self._pieces[key] = whole, self.words([piece.core for piece in pieces])
        return self._pieces[key]

    def _lengths(self, words: Sequence[str]) -> list[int]:
        """Count the tokens of each word in one text of all."""
        begins = np.cumsum([0, *(len(word) + 1 for word in words)])
        found = self._tokenizer.encode("".join(f" {word}" for word in words), add_special_tokens=False)
        # A token's end says where it is: its start may be the space before the word.
        ends = np.array([end for _, end in found.offsets], np.int64)
        counts = np.bincount(np.searchsorted(begins, ends, side="left") - 1, minlength=len(words))
        return [max(int(count), 1) for count in counts[: len(words)]]

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> int:
        """Return how many tokens the engine's prompt of a chat is, up to where the answer begins.

        Raises
        ------
        InvalidRequestError
            Code ``template_refused``: the model's template does not take such a chat.
        """
        return self.text(self.rendered(messages, tools))

    def rendered(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """Return the prompt of a chat as text."""
        try:
            return self._template.render(
                messages=messages,
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=True,
                **{name: value for name, value in self._special.items() if value is not None},
            )
        except TemplateError as error:
            raise InvalidRequestError(
                f"The model's chat template does not take these messages: {error}",
                code="template_refused",
                param="messages",
            ) from error

    @cached_property
    def message_overhead(self) -> int:
        """Tokens of a message besides its content, such as its role; the larger of user and assistant."""
        two = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        around = self.prompt([*two, *two[:1]]) - self.prompt(two[:1])
        return -(-around // 2) - self.text("a")

    @cached_property
    def must_alternate(self) -> bool:
        """Whether the template refuses two messages of one role in a row, or an answer that comes first."""
        answer, question = {"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}
        try:
            self.rendered([answer, question, question])
        except InvalidRequestError:
            return True
        return False

    def cut(self, text: str, max_tokens: int) -> str:
        """Return the longest beginning of a text that is at most so many tokens by itself."""
        if max_tokens <= 0:
            return ""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        if len(offsets) <= max_tokens:
            return text
        end = offsets[max_tokens - 1][1]
        while end and self.text(text[:end]) > max_tokens:  # half a character, or a merge that the cut undid
            end -= 1
        return text[:end]


class ByteCounter(Counter):
    """Stands in where the model's tokenizer is not on this machine: no token is less than a byte.

    What fits by this count fits; about four times as much would, mostly.
    """

    OVERHEAD = 24  # tokens that a template may put around a message

    def __init__(self) -> None:
        self._words, self._pieces = {}, {}

    def text(self, text: str) -> int:
        """Return a bound of a text's tokens."""
        return len(text.encode())

    def words(self, words: Sequence[str]) -> list[int]:
        """Return a bound of each word's tokens, a space before it."""
        return [self.text(word) + 1 for word in words]

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> int:
        """Return a bound of a prompt's tokens."""
        said = [f"{message.get('content') or ''}{json.dumps(message.get('tool_calls'))}" for message in messages]
        named = len(json.dumps(list(tools)).encode()) if tools else 0
        return sum(map(self.text, said)) + self.OVERHEAD * (len(said) + 2) + named

    @property
    def must_alternate(self) -> bool:
        """Whether it must is not known: then it does."""
        return True

    @property
    def message_overhead(self) -> int:
        """A bound of what is around a message."""
        return self.OVERHEAD + len("null")

    def cut(self, text: str, max_tokens: int) -> str:
        """Return the longest beginning of a text within so many bytes."""
        return text.encode()[: max(max_tokens, 0)].decode(errors="ignore")


def _template(model_dir: Path, config: Mapping[str, Any]) -> Template:
    """Return the chat template, compiled as transformers compiles it."""
    beside = model_dir / "chat_template.jinja"
    source = beside.read_text() if beside.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several, by their names
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if not isinstance(source, str):
        raise SetupError(
            f"{model_dir} has no chat template, so nothing can be asked of it. Name an instruction-tuned model.",
            code="tokenizer_missing",
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return environment.from_string(source)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
