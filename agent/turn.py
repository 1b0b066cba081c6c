"""One turn: route, generate, record. The episode is in the log before the client sees the end."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Any

import anyio

from agent import metrics
from agent.best_of import BestOf, Candidate
from agent.book import Asked, Begun, Book, unknown_model
from agent.memory.encoding import Asking
from agent.prompting import Prompted, Prompter
from agent.schema import ChatRequest, check_budget
from agent.tools.protocol import Call, Reader
from agent.tools.tool import Caller
from agent.tools.toolbox import Toolbox
from agent.tools.use import ToolUse
from feedback import episodes
from feedback.conversations import Place
from feedback.episodes import Recording
from infra.engine import LATEST, RUN_PREFIX
from infra.engine_wire import EngineError
from infra.errors import EverloopError, InvalidRequestError, NotFoundError, UnavailableError
from infra.fleet import Fleet
from infra.sealing import SubjectKey
from infra.settings import Settings
from infra.telemetry import tracing


@dataclass(frozen=True, slots=True)
class Waited:
    """An episode that stopped before its end, for somebody's yes or because something broke, to be gone on from.

    Parameters
    ----------
    claim
        Takes its calls to be made, for the episode of this name and once; returns which are allowed. None where
        there are none left to make.
    may_learn
        Whether it may be learned from; what goes on from it may be no more than that.
    """

    episode_id: str
    messages: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    claim: Callable[[str], Awaitable[dict[str, bool]]] | None
    may_learn: bool = True


class Turn:
    """An answer from its request to its episode: one generation, or as many as its calls of tools make it.

    Use :meth:`begin`, then iterate :meth:`deltas` to the end, or close it early: the episode is written
    either way, marked complete, interrupted or failed. Whoever may never come to iterate calls :meth:`close`.

    Parameters
    ----------
    must_end
        Whether it has to end now, as the process stops: the client gets a whole response, which says that it was
        cut (``length``), and the episode is interrupted.
    index
        Which of the answers to one request it is; all but the first take over what the first was assigned
        (``begun``).
    best
        Chooses among several answers, where that is on; not for what is streamed.
    toolbox
        The server's tools; none, if unset.
    waited
        The episode that this one goes on from.
    """

    def __init__(
        self,
        book: Book,
        fleet: Fleet,
        settings: Settings,
        body: ChatRequest,
        must_end: Callable[[], bool] = lambda: False,
        index: int = 0,
        best: BestOf | None = None,
        *,
        toolbox: Toolbox | None = None,
        waited: Waited | None = None,
    ) -> None:
        self.toolbox = toolbox
        self.waited = waited
        self.tools: ToolUse
        self._reader = Reader()
        self._is_step = False  # whether the generation that has ended last belongs to a step
        self._news: list[dict[str, Any]] = []
        self.index = index
        self.best = best
        self.begun: Begun | None = None
        self.book = book
        self.fleet = fleet
        self.settings = settings
        self.body = body
        self.must_end = must_end
        self.created = int(time.time())
        self.recording: Recording
        self._key: SubjectKey
        self._routes: dict[str, str] | None
        self._events: AsyncIterator[dict[str, Any]]
        self._stream: Any = None
        self._told: list[dict[str, Any]] = []
        self.prompted: Prompted | None = None
        self._prompter = Prompter(book, fleet, settings)
        self._asking: Asking | None = None
        self.has_begun = False
        self._is_closed = True  # there is nothing to be closed yet
        self._started_s = time.perf_counter()

    async def assign(self) -> Begun:
        """Choose the release that is to answer, and see that the request can be met; other choices take it over.

        Raises
        ------
        EverloopError
            As :meth:`begin`.
        """
        sampling = self.body.sampling(self.settings.max_answer_tokens)
        check_budget(sampling["max_tokens"], self.settings.max_model_tokens)
        trial = await self._version_of_run() if self.body.model.startswith(RUN_PREFIX) else None
        place = Place(self.body.conversation, self.body.parent) if self.body.conversation else None
        if self.waited is None:  # beside the database
            self._asking = self._prompter.ask(self.body)
        self.begun = begun = await self.book.begin(Asked(self.body.user, self.body.model, trial, place))
        assignment = begun.assignment
        if assignment.arm == "pinned" and trial is None and not await self.fleet.proved(assignment.release):
            raise unknown_model(assignment.release)
        return begun

    async def begin(self) -> None:
        """Choose the release and open the engine's stream; what is not streamed is generated in here.

        Raises
        ------
        EverloopError
            Where nothing was generated; then no episode is written, but of users in a canary. Of whoever hangs up
            meanwhile there is one, interrupted and empty.
        """
        begun = self.begun or await self.assign()
        assignment, self._key = begun.assignment, begun.key
        is_trial = assignment.release.startswith(RUN_PREFIX)
        self.tools = self._tools(begun)
        if self.prompted is None:
            waited = self.waited
            self.prompted = Prompted(waited.messages) if waited else await self.prompt(begun, self.tools)
        prompted = self.prompted
        self.tools.count = prompted.count or self.tools.count
        self.recording = Recording(
            episode_id=episodes.new_episode_id(),
            user_id=self.body.user,
            release=assignment.release,
            adapter_digest=assignment.adapter_digest,
            canary_id=assignment.canary_id,
            arm=assignment.arm,
            propensity=assignment.propensity,
            messages=prompted.messages,
            sampling=self.body.sampling(self.settings.max_answer_tokens, self.index),
            learn=self._may_learn(begun),
            conversation_id=self.body.conversation,
            parent_id=self.body.parent,
            context=prompted.context,
            request=self._noted(prompted),
            steps=self.tools.steps,
        )
        tracing.note(
            everloop__episode_id=self.recording.episode_id,
            everloop__arm=assignment.arm,
            everloop__release=assignment.release,
        )
        # A run serves its versions on the replica that it samples from.
        self._routes = {self.settings.need("engine_url"): assignment.release} if is_trial else None
        try:
            if self.waited:
                await self._resume(self.waited)
            if self.tools.stop is None:
                await self._open(self.tools.prompt(prompted.messages))
            self.has_begun, self._is_closed = True, False
        except EverloopError as error:
            # Who met an arm that could not answer counts for it, too; and what tools have done is done.
            failed = assignment.canary_id is not None and isinstance(error, EngineError | UnavailableError)
            if failed or self.tools.steps:
                self.recording.status = "failed"
                await self._end()
            raise
        except anyio.get_cancelled_exc_class():  # the client is gone
            with anyio.CancelScope(shield=True):
                await self._end()
            raise

    def _noted(self, prompted: Prompted) -> dict[str, Any] | None:
        given = {"given": prompted.given} if prompted.given else {}
        return {**(self.body.noted or {}), **given} or None

    async def _resume(self, waited: Waited) -> None:
        """Take over the steps of another episode, and make those of its calls that are allowed now."""
        allowed = await waited.claim(self.recording.episode_id) if waited.claim else {}
        await self.tools.resume(waited.episode_id, waited.steps, allowed)
        self.recording.finish_reason = self.tools.finish_reason

    def _tools(self, begun: Begun) -> ToolUse:
        """Return what tools may do in this turn, of all that there are and this person lets."""
        if self.toolbox is None:
            return ToolUse(self.settings, self.body, {}, None, self.must_end)
        offers = self.toolbox.offers(self.body.user, begun.tool_levels, self.body.server_tools)
        caller = Caller(self.body.user, self.toolbox.sessions)
        return ToolUse(self.settings, self.body, offers, caller, self.must_end)

    async def prompt(self, begun: Begun, tools: ToolUse | None = None) -> Prompted:
        """Return what the model is to see; other choices of the same request take it over."""
        max_tokens = self.body.sampling(self.settings.max_answer_tokens)["max_tokens"]
        tools, release = tools or self._tools(begun), begun.assignment.release
        explores = self._may_learn(begun)
        return await self._prompter.prompt(
            self.body, tools, release, max_tokens, explores=explores, asking=self._asking
        )

    def _may_learn(self, begun: Begun) -> bool:
        is_trial = begun.assignment.release.startswith(RUN_PREFIX)
        could_before = self.waited is None or self.waited.may_learn
        return self.body.store and begun.may_learn and could_before and not is_trial

    def memory_headers(self) -> dict[str, str]:
        """Return the header that tells how much of what was said before the model saw."""
        made = self.prompted.context if self.prompted else None
        if made is None:
            return {}
        used = {"kept": made["kept"], "earlier": made["earlier"], "memories": len(made["memories"])}
        return {"X-Everloop-Memory": json.dumps(used)}

    def _given(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the engine is to go on from, and that it is to tell how probable each token was."""
        told = {"top_logprobs": self.body.top_logprobs} if self.body.top_logprobs else {}
        return {"messages": messages, "logprobs": True, **told}

    def _payload(self, messages: list[dict[str, Any]], *, stream: bool, seed_after: int = 0) -> dict[str, Any]:
        sampling = self.recording.sampling
        return {
            **self._given(messages),
            "return_token_ids": True,
            **({"stream_options": {"include_usage": True}} if stream else {}),
            **sampling,
            **({"seed": sampling["seed"] + seed_after} if seed_after and "seed" in sampling else {}),
            **({} if self.tools.forced else self.body.shape()),  # one form at a time
            **self.tools.payload(),
        }

    async def _open(self, messages: list[dict[str, Any]]) -> None:
        """Have the release go on from `messages`."""
        self._reader = self.tools.reader()
        self._stream = self.fleet.stream_chat(
            self.recording.release,
            self._payload(messages, stream=self.body.stream),
            affinity=self.body.prompt_cache_key or self.body.user,
            routes=self._routes,
            at_once=not self.body.stream,
        )
        self._events = await self._stream.__aenter__()

    async def _end(self) -> None:
        self.tools.end(self.recording.status)
        self.recording.latency_ms = self._elapsed_ms()
        metrics.note(self.recording)
        await self.book.end(self.recording, self._key)

    async def _version_of_run(self) -> str:
        """Return the version of a run in progress that is asked for, by number or as ``run/ID@latest``."""
        run, _, version = self.body.model.partition("@")
        served = [name for name in await self.fleet.models() if name.startswith(f"{run}@")]
        if version == LATEST:
            served.sort(key=lambda name: int(name.rpartition("@")[2]))
            found = served[-1:]
        else:
            found = [name for name in served if name == self.body.model]
        if not found:
            raise NotFoundError(
                f"{self.body.model!r} is not served: the run has ended, or has no checkpoint yet. GET /v1/models "
                "lists what is.",
                code="model_not_found",
                param="model",
            )
        return found[0]

    async def deltas(self) -> AsyncIterator[str]:
        """Yield the answer's text as it is generated; when this ends, the episode is written.

        A piece without text comes where a step has news (:meth:`take_news`). Closing it early stops the engine and
        the tools, and writes the episode as interrupted.
        """
        try:
            if self.tools.last_step is not None:  # gone on from, with what has come of it
                yield self._tell(self.tools.last_step)
            while self.tools.stop is None:
                async with aclosing(self._generation()) as texts:  # type: ignore[type-var]
                    async for text in texts:
                        yield text
                if self.must_end() and not self.recording.finish_reason:
                    self.recording.finish_reason = "length"
                    return
                tail, calls = self._reader.end()
                if tail:
                    self._say(tail)
                    yield tail
                if not self._begin_step(calls):
                    break
                yield self._tell(self.tools.steps[-1])
                await self.tools.act()
                yield self._tell(self.tools.steps[-1])
                if self.tools.stop is not None:
                    self.recording.finish_reason = self.tools.finish_reason
                    break
                if not await self._go_on():
                    break
            await self._improve()
            if self.tools.stop != "server_stopping":
                self.recording.status = "complete" if self.recording.finish_reason else "failed"
        except EverloopError:
            self.recording.status = "failed"
            raise
        finally:
            await self.close()

    def _tell(self, step: dict[str, Any]) -> str:
        self._news.append(step)
        return ""

    async def _generation(self) -> AsyncIterator[str]:
        """Yield the text of one generation, without the calls in it; it may be cut, as the process must end."""
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            async for event in events:
                text = self._take(event)
                if text:
                    yield text
                if self.must_end() and not self.recording.finish_reason:
                    return

    def _begin_step(self, calls: Sequence[Call]) -> bool:
        """Begin a step, where the generation called tools; what it said beside goes with the step."""
        recording = self.recording
        if recording.finish_reason == "length" and calls and not calls[-1].is_whole:
            self.tools.cut_off = True
            calls = calls[:-1]
        if not recording.finish_reason or not calls:
            return False
        self.tools.take(recording.answer, calls, len(recording.token_ids), recording.num_prompt_tokens)
        self._is_step = True
        return True

    async def _go_on(self) -> bool:
        """Open the next generation, on what the tools returned; return False where no room is left for it."""
        await self._stream.__aexit__(None, None, None)
        self._stream = None
        recording = self.recording
        for self.tools.is_short_of_room in (False, True):
            try:
                await self._open(self.tools.prompt(recording.messages))
                break
            except InvalidRequestError as error:
                if error.code != "context_length_exceeded":
                    raise
        else:
            self.tools.stop, recording.finish_reason = "context_full", "length"
            return False
        # The episode's tokens are those of its answer; each step has the number of its own.
        recording.answer, recording.finish_reason, recording.num_prompt_tokens = "", None, 0
        recording.token_ids, recording.logprobs, self._told = [], [], []
        self._is_step = False
        return True

    async def close(self) -> None:
        """Stop the engine and write the episode, if the turn has begun and that has not been done."""
        if self._is_closed:
            return
        self._is_closed = True
        # The client may be gone and this task cancelled: the episode is written all the same.
        with anyio.CancelScope(shield=True):
            try:
                if self._stream is not None:  # between two generations there is none
                    await self._stream.__aexit__(None, None, None)
            finally:
                await self._end()

    def _take(self, event: dict[str, Any]) -> str:
        recording = self.recording
        if event.get("usage"):
            recording.num_prompt_tokens = event["usage"]["prompt_tokens"]
        if not event["choices"]:
            return ""
        choice = event["choices"][0]
        if read := event.get("prompt_token_ids") or choice.get("prompt_token_ids"):
            recording.num_prompt_tokens = len(read)
        text = self._reader.feed(choice["delta"])
        if self.body.stream and recording.ttft_ms is None and text:
            recording.ttft_ms = self._elapsed_ms()
        self._say(text)
        recording.token_ids += choice.get("token_ids") or []
        told = (choice.get("logprobs") or {}).get("content") or []
        recording.logprobs += [token["logprob"] for token in told]
        if self.body.logprobs:
            self._told += told
        recording.finish_reason = choice.get("finish_reason") or recording.finish_reason
        return text

    def _say(self, text: str) -> None:
        # Half a surrogate pair or a NUL cannot be stored.
        self.recording.answer += text.replace("\x00", "").encode("utf-8", "replace").decode()

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Tokens that all generations of the turn read, and those that they wrote."""
        read, written = self.tools.spent
        if self._is_step:
            return read, written
        return read + self.recording.num_prompt_tokens, written + len(self.recording.token_ids)

    def take_news(self) -> list[dict[str, Any]]:
        """Return the steps of which something has become known since this was last asked for, as they are now."""
        news, self._news = self._news, []
        return news

    def take_logprobs(self) -> list[dict[str, Any]]:
        """Return what is known of each token since this was last asked for; nothing where it is not wanted."""
        told, self._told = self._told, []
        return told

    async def _improve(self) -> None:
        """Give the best of several answers instead, where the release or the settings say so.

        Not where tools may be called: another answer would go on from other calls.
        """
        assert self.begun is not None
        best_of = self.begun.assignment.best_of or self.settings.best_of
        recording = self.recording
        is_whole = bool(recording.answer and recording.finish_reason and not self.tools.functions)
        if self.best is not None and best_of > 1 and is_whole:
            await self.best.improve(self, best_of)

    def open_again(self, num: int) -> AbstractAsyncContextManager[AsyncIterator[dict[str, Any]]]:
        """Have the release that answers answer `num` times more, each in one piece."""
        return self.fleet.stream_chat(
            self.recording.release,
            {**self._payload(self.recording.messages, stream=False, seed_after=1), "n": num},
            affinity=self.body.prompt_cache_key or self.body.user,
            routes=self._routes,
            at_once=True,
        )

    def take_over(self, other: Candidate) -> None:
        """Give another answer instead."""
        recording = self.recording
        recording.answer, recording.finish_reason = other.answer, other.finish_reason
        recording.token_ids = list(other.token_ids)
        recording.logprobs = [token["logprob"] for token in other.told]
        self._told = list(other.told) if self.body.logprobs else []

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self._started_s) * 1000.0
