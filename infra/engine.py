"""Client of the engine (a vLLM server): chat streams, plain completions, adapters and probes."""

from __future__ import annotations

import math
import re
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import orjson

from infra import connections
from infra import engine_wire as wire
from infra.engine_wire import EngineError

CONNECT_TIMEOUT_S = 2.0
WHOLE_ANSWER_SILENCE = 4.0
YES, NO = "Yes", "No"
RUN_PREFIX, LATEST = "run/", "latest"  # adapters that are still being trained: run/ID@VERSION, or run/ID@latest
_STARTED_AT = re.compile(r"^process_start_time_seconds (\S+)$", re.MULTILINE)
_NUM_REQUESTS = re.compile(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", re.MULTILINE)


@cache
def _trusted() -> ssl.SSLContext:
    """Return the certificates that are trusted: reading them takes 30 ms, and a client may be made every second."""
    return httpx.create_ssl_context()


class EngineClient:
    """An asynchronous client of one vLLM server.

    Parameters
    ----------
    url
        Root address of the server, without ``/v1``.
    key
        What it asks for, if it does (vLLM's ``--api-key``).
    timeout_s
        Longest silence within one response.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = 120.0) -> None:
        self.url = url
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=connections.limits(),
            trust_env=False,
            verify=_trusted(),
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )
        self._timeout_s = timeout_s
        self.num_streams = 0
        self._stream_ended_s = -math.inf
        self._yes_no_ids: list[int] = []

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @property
    def idle_s(self) -> float:
        """Seconds since the last chat stream through this client ended; 0 while one is open."""
        return 0.0 if self.num_streams else time.monotonic() - self._stream_ended_s

    @asynccontextmanager
    async def stream_chat(self, payload: dict[str, Any]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """Open a chat completion stream; leaving the block early makes the engine stop generating.

        A payload with a `prompt` instead of `messages` is continued as it stands, and told in the same way.

        Yields
        ------
        AsyncIterator[dict]
            The ``chat.completion.chunk`` objects.
        """
        request = self._chat_request({**payload, "stream": True}, self._timeout_s)
        with self._counted():
            try:
                response = await self._http.send(request, stream=True)
            except httpx.TransportError as error:
                raise wire.unavailable() from error
            try:
                if response.status_code != 200:
                    raise await wire.read_refusal(response)
                # Closed here: a generator that is left to itself closes beside us, and each breaks the other.
                async with aclosing(wire.chunks(response)) as chunks:
                    yield chunks
            finally:
                await response.aclose()

    @asynccontextmanager
    async def chat_at_once(self, payload: dict[str, Any]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """Do as :meth:`stream_chat`, with the whole answer in one chunk.

        A chunk for each token, with its log-probability, costs engine and reader more than some steps of a small
        model do: whoever does not show an answer as it comes is spared that.
        """
        with self._counted():
            request = self._chat_request(payload, self._timeout_s * WHOLE_ANSWER_SILENCE)
            body = wire.chunk((await self._send(request)).content)
            yield wire.at_once(
                {**body, "choices": [{"delta": choice.get("message"), **choice} for choice in body["choices"]]}
            )

    async def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            response = await self._http.send(request)
        except httpx.TransportError as error:
            raise wire.unavailable() from error
        if response.status_code != 200:
            raise wire.refusal(response)
        return response

    def _chat_request(self, payload: dict[str, Any], silence_s: float) -> httpx.Request:
        return self._http.build_request(
            "POST",
            "/v1/completions" if "prompt" in payload else "/v1/chat/completions",
            content=orjson.dumps(payload),
            headers={"Content-Type": "application/json"},
            timeout=httpx.Timeout(silence_s, connect=CONNECT_TIMEOUT_S),
        )

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.num_streams += 1
        try:
            yield
        finally:
            self.num_streams -= 1
            self._stream_ended_s = time.monotonic()

    async def chat(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Return one whole chat completion."""
        return await self._post("/v1/chat/completions", payload)

    async def p_yes(self, model: str, messages: Sequence[dict[str, Any]]) -> float:
        """Return how probable the model finds Yes as its answer to the last message, given that it is Yes or No.

        One token is generated, constrained to the two. Whether the engine reports log-probabilities from before the
        constraint or after it (vLLM's ``logprobs_mode``), the odds of the two are the same.

        Raises
        ------
        EngineError
            Code ``not_yes_or_no`` where a word is not one token of this model, or the engine reports other tokens.
        """
        if not self._yes_no_ids:
            self._yes_no_ids = [await self._token_id(model, word) for word in (YES, NO)]
        payload = {
            "model": model,
            "messages": list(messages),
            "max_tokens": 1,
            "temperature": 1.0,
            "allowed_token_ids": self._yes_no_ids,
            "logprobs": True,
            "logprob_token_ids": self._yes_no_ids,
        }
        (token,) = (await self.chat(payload))["choices"][0]["logprobs"]["content"]
        logprobs = {entry["token"].strip(): entry["logprob"] for entry in token["top_logprobs"]}
        if logprobs.keys() != {YES, NO}:
            self._yes_no_ids = []  # another model may answer at this address now
            raise EngineError(f"The engine reports {sorted(logprobs)} for Yes and No.", code="not_yes_or_no")
        # A word that the model rules out altogether is reported as -9999: the larger exponent must be 0.
        highest = max(logprobs.values())
        yes, no = (math.exp(logprobs[word] - highest) for word in (YES, NO))
        return yes / (yes + no)

    async def _token_id(self, model: str, word: str) -> int:
        payload = {"model": model, "prompt": word, "add_special_tokens": False}
        tokens = (await self._post("/tokenize", payload))["tokens"]
        if len(tokens) != 1:
            raise EngineError(f"{word!r} is {len(tokens)} tokens of {model}, not one.", code="not_yes_or_no")
        return int(tokens[0])

    async def models(self) -> list[str]:
        """Return the names of the models and adapters that the engine holds now."""
        response = await self._send(self._http.build_request("GET", "/v1/models", timeout=5.0))
        return [model["id"] for model in response.json()["data"]]

    async def num_requests(self) -> int:
        """Return how many sequences the engine works on or has in its queue, whoever asked for them."""
        return int(sum(float(value) for value in _NUM_REQUESTS.findall(await self._metrics())))

    async def _metrics(self) -> str:
        return (await self._send(self._http.build_request("GET", "/metrics", timeout=5.0))).text

    async def started_at_s(self) -> float | None:
        """Return when the engine's process began (seconds since 1970): another time is another life of it."""
        found = _STARTED_AT.search(await self._metrics())
        return float(found[1]) if found else None

    async def version(self) -> str | None:
        """Return the version of vLLM; None where the server does not tell it."""
        try:
            response = await self._http.get("/version", timeout=5.0)
        except httpx.TransportError as error:
            raise wire.unavailable() from error
        body = response.json() if response.status_code == 200 else {}
        return body.get("version")

    async def logprobs_are_processed(self, model: str) -> bool:
        """Tell whether reported log-probabilities are those that answers are sampled from.

        With `top_k` 1 only one token is left, so its log-probability is 0 then, and less before.
        """
        payload = {"model": model, "prompt": "Once", "max_tokens": 1, "temperature": 1.0, "top_k": 1, "logprobs": 0}
        choice = (await self._post("/v1/completions", payload))["choices"][0]
        return bool(choice["logprobs"]["token_logprobs"][0] > -1e-6)

    async def load_adapter(self, name: str, path: Path) -> None:
        """Load an adapter directory under a new name."""
        await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})

    async def unload_adapter(self, name: str) -> None:
        """Drop an adapter."""
        await self._post("/v1/unload_lora_adapter", {"lora_name": name})

    async def prompt_logprobs(self, model: str, prompt: str) -> list[float]:
        """Return the log-probability of each token of `prompt` (nats), the first excluded."""
        payload = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        choice = (await self._post("/v1/completions", payload))["choices"][0]
        return [next(iter(entry.values()))["logprob"] for entry in choice["prompt_logprobs"][1:]]

    async def token_logprobs(self, model: str, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Return the log-probability that a model gives each token of an answer (nats), temperature 1."""
        payload = {"model": model, "prompt": [*prompt_ids, *token_ids], "max_tokens": 1, "prompt_logprobs": 0}
        choice = (await self._post("/v1/completions", {**payload, "add_special_tokens": False}))["choices"][0]
        told = choice["prompt_logprobs"][len(prompt_ids) :]
        return [entry[str(token)]["logprob"] for token, entry in zip(token_ids, told, strict=True)]

    async def _post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        response = await self._send(self._http.build_request("POST", path, json=payload))
        try:
            body = response.json()
        except ValueError:  # the adapter routes answer in plain text
            return {}
        return body if isinstance(body, dict) else {}


def mean_abs_difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the mean absolute difference of two probes (nats per token)."""
    if len(a) != len(b) or not a:
        raise ValueError("Probes must have the same, non-zero number of tokens.")
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)
