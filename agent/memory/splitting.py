"""A long message in several chunks, so that a part of it can matter without the rest."""

from __future__ import annotations

from dataclasses import replace

from agent.memory.importance import Chunk
from agent.memory.words import analyse

PART_CHARS = 600  # a longer message is several chunks


def parts(chunk: Chunk) -> list[Chunk]:
    """Split a long message at the ends of sentences into chunks of about the same length."""
    if len(chunk.text) <= PART_CHARS:
        return [chunk]
    analysis = analyse(chunk.text)
    starts = [analysis.pieces[first].start for first, _ in analysis.sentences]
    num = -(-len(chunk.text) // PART_CHARS)
    cuts = [0]
    for number in range(1, num):
        wanted = number * len(chunk.text) // num
        start = min(starts, key=lambda at: abs(at - wanted), default=0)
        if start > cuts[-1]:
            cuts.append(start)
    ends = [*cuts[1:], len(chunk.text)]
    return [
        replace(chunk, text=text)
        for start, end in zip(cuts, ends, strict=True)
        if (text := chunk.text[start:end].strip())
    ]
