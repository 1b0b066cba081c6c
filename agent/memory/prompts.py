"""What the model is to see of a turn: the request, the past out of the raw log, and what is known of the person."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent import metrics
from agent.memory import facts, store
from agent.memory.context import Context, Message, build, too_long
from agent.memory.counting import ByteCounter, Counter
from agent.memory.encoding import NOT_ASKED, Asking, Encoding
from agent.memory.importance import Chunk, defaults
from agent.memory.learning import Draw, draw
from agent.memory.rewriting import Ask, rewritten
from agent.memory.vectors import WordVectors, of_settings
from feedback.episodes import Recording
from infra.access.roles import ANONYMOUS
from infra.db import Sessions, transaction
from infra.errors import InvalidRequestError, SetupError
from infra.settings import Settings

log = logging.getLogger("everloop.agent")

# The release is asked about its own answer, in a message of its own (:mod:`agent.self_evaluation`).
RESERVED_TOKENS = 48
MESSAGE_TOKENS = 24  # a system message around a text, where there was none
OVERHEAD_BYTES = 32  # of a message, roles and all
SHARE_OF_MEMORIES = 0.125  # of the budget
INTRODUCTION = "What the person you talk to has told you of themselves:"
ENCODER_AWAY = "encoder_away"  # words alone have found what was said
DEFAULT_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request, as far as memory is concerned.

    Parameters
    ----------
    messages
        As they came; the last is the question.
    max_answer_tokens
        What must be left for the answer.
    truncate
        Whether a question that is too long is cut; else it is refused.
    explores
        Whether weights may be tried that are a little different, so that they are learned.
    introduction
        What is added to the system message afterwards, to tell of tools; room is left for it.
    reserved_tokens
        Room for what tools return, as far as a third of all goes.
    asking
        The question, where it is being read already (:meth:`Remembering.ask`).
    """

    user: str
    messages: Sequence[Message]
    conversation: str | None
    parent: str | None
    max_answer_tokens: int
    truncate: bool = False
    explores: bool = False
    tools: Sequence[dict[str, Any]] | None = None
    introduction: str = ""
    reserved_tokens: int = 0
    asking: Asking | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is to see, and how it was made; None where it is what the client sent."""

    messages: list[Message]
    record: dict[str, Any] | None
    context: Context | None = None

    async def written_by(self, ask: Ask, counter: Counter) -> Prompt:
        """Return it with what was cut written again by the model, where that holds."""
        if self.context is None or self.record is None:
            return self
        context = await rewritten(self.context, ask, counter)
        return Prompt(context.messages, {**self.record, **context.record()}, context)


class Remembering:
    """Makes the prompts of one API process. The tokenizer is read when the first is made.

    Parameters
    ----------
    encoding
        Finds what was said in other words; without it, words and their vectors do what they can.
    """

    def __init__(self, sessions: Sessions, settings: Settings, encoding: Encoding | None = None) -> None:
        self.sessions = sessions
        self.settings = settings
        self.encoding = encoding
        self._lock = threading.Lock()
        self._counter: Counter | None = None
        self._vectors: WordVectors | None = None

    def needs_nothing(self, wanted: Wanted) -> bool:
        """Tell whether a request is what the model is to see, without counting: no token is less than a byte."""
        if wanted.conversation is not None or wanted.tools:
            return False
        sizes = [len(str(message.get("content") or "").encode()) + OVERHEAD_BYTES for message in wanted.messages]
        sizes.append(len(wanted.introduction.encode()))
        return sum(sizes) + 8 * OVERHEAD_BYTES <= self._free(wanted)

    def prompt(self, wanted: Wanted) -> Prompt:
        """Return what the model is to see; blocks on the database.

        Raises
        ------
        InvalidRequestError
            Code ``context_length_exceeded``, where the question does not fit and may not be cut.
        """
        counter = self.counter()
        started_s = time.perf_counter()
        asking = wanted.asking or self.ask(wanted.messages, wanted.conversation, wanted.parent)
        system, earlier, last = divided(wanted.messages)
        question = str(last[0].get("content") or "")
        with transaction(self.sessions) as session:
            known: list[tuple[str, str]] = []
            # Whoever sends all that is to be seen gets an answer to that, and to nothing else.
            if wanted.conversation is not None and wanted.user != ANONYMOUS:
                known = facts.known(session, wanted.user, by_default=self.settings.memory)
            past = store.Past([], 0)
            if wanted.conversation is not None:
                past = store.past(session, wanted.conversation, wanted.parent, question, self._vectors, asking)
            has_sentences = any(chunk.nearness is not None for chunk in past.chunks)
            usual = defaults(has_vectors=self._vectors is not None, has_sentences=has_sentences)
            drawn = draw(session, usual, explores=wanted.explores)
        if not past.chunks:
            past = store.Past(_chunks(earlier), len(earlier))
        made = self._built(wanted, counter, system, past, last, known, drawn)
        if asking.is_in_vain and made.context is not None and made.record is not None:
            made.record["notes"] = [*made.record.get("notes", []), ENCODER_AWAY]
        metrics.note_context(made.record, time.perf_counter() - started_s, is_whole=made.context is None)
        return made

    def ask(self, messages: Sequence[Message], conversation: str | None, parent: str | None) -> Asking:
        """Have the question of a request read, where it follows something; other things are done meanwhile."""
        if self.encoding is None or conversation is None or parent is None:
            return NOT_ASKED
        return self.encoding.ask(str(divided(messages)[2][0].get("content") or ""))

    def written(self, recording: Recording) -> None:
        """Have a turn that was just written found again by what it says."""
        if self.encoding is not None and recording.conversation_id is not None:
            self.encoding.written(recording.conversation_id)

    def _built(
        self,
        wanted: Wanted,
        counter: Counter,
        system: list[Message],
        past: store.Past,
        last: list[Message],
        known: list[tuple[str, str]],
        drawn: Draw,
    ) -> Prompt:
        budget = self._free(wanted)
        if wanted.introduction:
            budget -= counter.text(wanted.introduction) + MESSAGE_TOKENS
        notes: list[str] = []
        used: list[str] = []
        fixed = counter.prompt([*system, *last], wanted.tools)
        if fixed > budget:
            if not wanted.truncate:
                raise too_long(fixed, budget)
            last = _cut(counter, system, last, budget, wanted.tools)
            notes.append(f"question_cut_from_{fixed}_tokens")
        elif known:
            system, used = _with_memories(counter, system, last, known, budget, wanted.tools)
        context: Context = build(
            past.chunks,
            last,
            budget,
            drawn.weights,
            counter,
            vectors=self._vectors,
            system=system,
            tools=wanted.tools,
            num_earlier=past.num_messages,
        )
        pinned = [kept for kept in context.kept if kept.chunk.pinned]
        notes += ["pinned_cut"] * any(kept.num_tokens < kept.num_raw_tokens for kept in pinned)
        if context.is_whole and not used and not notes and wanted.conversation is None:
            return Prompt(context.messages, None)
        record = {**context.record(), "memories": used, "weights": drawn.version}
        record |= {"notes": notes} if notes else {}
        record |= {"drawn": drawn.offsets} if drawn.offsets and not context.is_whole else {}
        return Prompt(context.messages, record, None if context.is_whole else context)

    def budget(self, max_answer_tokens: int) -> int:
        """Return the tokens that a prompt may have."""
        free = self.settings.max_model_tokens - max_answer_tokens
        free -= RESERVED_TOKENS if self.settings.self_evaluation and free > 4 * RESERVED_TOKENS else 0
        return min(free, self.settings.memory_tokens or free)

    def _free(self, wanted: Wanted) -> int:
        budget = self.budget(wanted.max_answer_tokens)
        return budget - min(wanted.reserved_tokens, budget // 3)

    def counter(self) -> Counter:
        """Return what counts tokens; it is read when it is first asked for."""
        with self._lock:
            if self._counter is None:
                try:
                    self._counter = Counter(self.settings.base_model_dir)
                except (SetupError, OSError, ValueError) as error:
                    log.warning("tokens are counted as bytes, of which fewer fit: %s", error)
                    self._counter = ByteCounter()
                self._vectors = of_settings(self.settings)
            return self._counter


def divided(messages: Sequence[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Divide a request into what comes first, what was said before, and what is asked now."""
    num_first = next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages) - 1)
    num_first = min(num_first, len(messages) - 1)
    begins = len(messages) - 1
    while begins > num_first and messages[begins]["role"] not in ("user", "system"):
        begins -= 1  # calls of tools and their results belong to the question
    return list(messages[:num_first]), list(messages[num_first:begins]), list(messages[begins:])


def _chunks(messages: Sequence[Message]) -> list[Chunk]:
    """Return what a client says was said before; of calls of tools only the words around them."""
    return [
        Chunk(message["role"], message["content"], None, at)
        for at, message in enumerate(messages)
        if isinstance(message.get("content"), str) and message["role"] in ("user", "assistant", "system")
    ]


def _cut(
    counter: Counter,
    system: list[Message],
    last: list[Message],
    budget: int,
    tools: Sequence[dict[str, Any]] | None,
) -> list[Message]:
    """Return the question with its middle left out: what is asked stands at one of the ends."""
    text = str(last[0].get("content") or "")
    low, high = 0, len(text)
    best: list[Message] | None = None
    while low <= high:
        kept = (low + high) // 2
        end = text[len(text) - kept // 2 :] if kept // 2 else ""
        trial = [{**last[0], "content": f"{text[: kept - kept // 2]} … {end}"}, *last[1:]]
        if counter.prompt([*system, *trial], tools) <= budget:
            best, low = trial, kept + 1
        else:
            high = kept - 1
    if best is None:
        raise too_long(counter.prompt([*system, *last], tools), budget)
    return best


def _with_memories(
    counter: Counter,
    system: list[Message],
    last: list[Message],
    known: list[tuple[str, str]],
    budget: int,
    tools: Sequence[dict[str, Any]] | None,
) -> tuple[list[Message], list[str]]:
    """Add what is known of the person to what comes first, the newest of it, for as long as its share lasts."""
    text = f"{system[0]['content'] if system else DEFAULT_SYSTEM}\n\n{INTRODUCTION}"
    free = min(int(SHARE_OF_MEMORIES * budget), budget - counter.prompt([*system, *last], tools)) - counter.text(
        text
    )
    used: list[str] = []
    for memory_id, said in known:
        free -= counter.text(f"\n- {said}") + 1
        if free < 0:
            break
        text += f"\n- {said}"
        used.append(memory_id)
    first = [{"role": "system", "content": text}, *system[1:]]
    try:
        fits = counter.prompt([*first, *last], tools) <= budget
    except InvalidRequestError:  # a template without a place for what comes first
        fits = False
    return (first, used) if used and fits else (system, [])
