"""The answers to one request, one or several: each is a turn with an episode of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing

import anyio

from agent.turn import Turn
from infra.errors import EverloopError

Delta = tuple[Turn, str | None]
"""A turn with a piece of its answer; None once its answer has ended."""


class Choices:
    """Turns that answer the same request, under the release that the first of them was assigned.

    They are asked for at once; the engine reads their prompt for the first, and has it in its cache for the others.
    """

    def __init__(self, turns: Sequence[Turn]) -> None:
        self.turns = list(turns)

    @property
    def first(self) -> Turn:
        """The turn whose episode names the response."""
        return self.turns[0]

    async def begin(self) -> None:
        """Begin all turns, as :meth:`agent.turn.Turn.begin` does; where one cannot, none goes on."""
        begun = await self.first.assign()
        for turn in self.turns:
            turn.begun = begun
        if len(self.turns) > 1:
            prompted = await self.first.prompt(begun)
            for turn in self.turns:
                turn.prompted = prompted
        await self._each(lambda turn: turn.begin())

    async def finish(self) -> None:
        """Begin all turns and have each answer to its end."""

        async def drain(turn: Turn) -> None:
            async with aclosing(turn.deltas()) as deltas:  # type: ignore[type-var]
                async for _ in deltas:
                    pass

        await self.begin()
        await self._each(drain)

    async def _each(self, work: Callable[[Turn], Awaitable[None]]) -> None:
        """Do the work for all turns together; then the first error is raised, if there was one.

        One is not ended by another's error: mostly all have the same, and then nothing is written.
        """
        if len(self.turns) == 1:
            await work(self.first)
            return
        problem: EverloopError | None = None
        async with anyio.create_task_group() as tasks:

            async def one(turn: Turn) -> None:
                nonlocal problem
                try:
                    await work(turn)
                except EverloopError as error:  # out of here it would be a group of one
                    problem = problem or error

            for turn in self.turns:
                tasks.start_soon(one, turn)
        if problem is not None:
            await self.close()
            raise problem

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield pieces of the answers as they come, and None at the end of each; then all episodes are written.

        Raises
        ------
        EverloopError
            One of them failed; the others end with it, interrupted.
        """
        if len(self.turns) == 1:
            async with aclosing(self.first.deltas()) as deltas:  # type: ignore[type-var]
                async for text in deltas:
                    yield self.first, text
            yield self.first, None
            return
        pieces: asyncio.Queue[Delta | BaseException] = asyncio.Queue(maxsize=len(self.turns))

        # Tasks and no task group: a generator may be closed from elsewhere than it was begun. Each has its scope,
        # since a task that is cancelled as such would not end what is shielded, as is the writing of an episode.
        scopes = [anyio.CancelScope() for _ in self.turns]

        async def read(turn: Turn, scope: anyio.CancelScope) -> None:
            with scope:
                try:
                    async with aclosing(turn.deltas()) as deltas:  # type: ignore[type-var]
                        async for text in deltas:
                            await pieces.put((turn, text))
                    await pieces.put((turn, None))
                except Exception as error:
                    await pieces.put(error)

        readers = [asyncio.create_task(read(*each)) for each in zip(self.turns, scopes, strict=True)]
        try:
            num_open = len(self.turns)
            while num_open:
                piece = await pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                num_open -= piece[1] is None
                yield piece
        finally:
            for scope in scopes:
                scope.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.gather(*readers, return_exceptions=True)

    async def close(self) -> None:
        """Close what is still open, as :meth:`agent.turn.Turn.close` does."""
        for turn in self.turns:
            await turn.close()
