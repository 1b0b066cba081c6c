"""An engine that answers at once: what remains of a request's time is the gateway's own.

It speaks as much of vLLM's HTTP as Everloop uses, with a fixed answer. Whoever asks it to do something "in 4 steps"
gets a call of the calculator until four results have come. Only benches start it.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import Any

ANSWER = "A fixed answer of sixteen tokens, which nobody had to wait for at all."
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "6 * 7"}}</tool_call>'
RESULT = rb"<tool_result>\n["  # as it stands in JSON
NUM_TOKENS = 16
USAGE = {"prompt_tokens": 20, "completion_tokens": NUM_TOKENS, "total_tokens": 20 + NUM_TOKENS}
PROBE_LOGPROB = -1.0


def _chunk(choice: dict[str, Any]) -> bytes:
    body = {"id": "chatcmpl-null", "object": "chat.completion.chunk", "created": 0, "model": "base"}
    return b"data: " + json.dumps({**body, "choices": [choice]}).encode() + b"\n\n"


def _pieces(text: str) -> list[str]:
    """Return a text in as many pieces as there are tokens."""
    size = -(-len(text) // NUM_TOKENS)
    return [text[at * size : (at + 1) * size] for at in range(NUM_TOKENS)]


def _stream(text: str) -> bytes:
    """Return the whole stream, with a token id and a log-probability for each token as vLLM sends them."""
    chunks = [_chunk({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})]
    for number, piece in enumerate(_pieces(text)):
        logprobs = {"content": [{"token": piece, "logprob": -0.5, "top_logprobs": []}]}
        last = "stop" if number == NUM_TOKENS - 1 else None
        delta = {"index": 0, "delta": {"content": piece}, "logprobs": logprobs, "finish_reason": last}
        chunks.append(_chunk({**delta, "token_ids": [number]}))
    chunks.append(b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n")
    return b"".join(chunks) + b"data: [DONE]\n\n"


def _at_once(text: str) -> bytes:
    """Return the same as one answer."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "logprobs": {"content": [{"token": piece, "logprob": -0.5, "top_logprobs": []} for piece in _pieces(text)]},
        "token_ids": list(range(NUM_TOKENS)),
        "finish_reason": "stop",
    }
    return json.dumps({"choices": [choice], "usage": USAGE, "prompt_token_ids": list(range(20))}).encode()


STREAMS, AT_ONCE = (
    {text: _stream(text) for text in (ANSWER, CALL)},
    {text: _at_once(text) for text in (ANSWER, CALL)},
)
STEPS = re.compile(rb"Do it in (\d+) steps")
METRICS = (
    f"process_start_time_seconds {time.time():.2f}\n"
    'vllm:num_requests_running{model_name="base"} 0.0\nvllm:num_requests_waiting{model_name="base"} 0.0\n'
).encode()


def answer_to(path: str, body: bytes) -> tuple[str, bytes]:
    """Return media type and body of an answer."""
    if path == "/metrics":
        return "text/plain", METRICS
    if path == "/v1/chat/completions":
        wanted = STEPS.search(body)
        text = CALL if wanted and body.count(RESULT) < int(wanted[1]) else ANSWER
        if json.loads(body).get("stream"):
            return "text/event-stream", STREAMS[text]
        return "application/json", AT_ONCE[text]
    if path == "/v1/completions":
        num_tokens = len(json.loads(body)["prompt"].split()) + 1
        told = [None, *({"1": {"logprob": PROBE_LOGPROB}} for _ in range(num_tokens))]
        return "application/json", json.dumps({"choices": [{"prompt_logprobs": told}]}).encode()
    return "application/json", json.dumps({"data": [{"id": "base"}]}).encode()


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            path = head.split(b" ", 2)[1].decode()
            length = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
            )
            media_type, body = answer_to(path, await reader.readexactly(length) if length else b"")
            writer.write(
                f"HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def _main(port: int) -> None:
    server = await asyncio.start_server(_serve, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
