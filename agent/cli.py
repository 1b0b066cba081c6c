"""``everloop chat``."""

from __future__ import annotations

import getpass
import uuid
from typing import Annotated

import httpx
import typer

from infra import report
from infra.errors import EverloopError
from infra.settings import Settings, load

THUMBS = {"/up": 1, "/down": -1, "/undo": 0}


def chat(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "--adapter",
            help="everloop, the name of a release, or run/ID@latest for a run while it trains.",
        ),
    ] = "everloop",
    prompt: Annotated[str | None, typer.Argument(help="Ask this and leave; without it, a conversation.")] = None,
) -> None:
    """Talk to the assistant; /up, /down and /undo rate the last answer, Ctrl-D leaves."""
    import openai

    settings = load()
    url, key = settings.need("public_url"), settings.service_key or "unused"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    messages: list[dict[str, str]] = []
    episode_id: str | None = None
    while True:
        try:
            text = prompt or input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text in THUMBS:
            _rate(settings, episode_id, THUMBS[text])
        elif text:
            messages.append({"role": "user", "content": text})
            episode_id, answer = _answer(client, model, messages)
            messages.append({"role": "assistant", "content": answer})
        if prompt:
            return


def _answer(client: object, model: str, messages: list[dict[str, str]]) -> tuple[str, str]:
    import openai
    from openai.types.chat import ChatCompletionChunk

    assert isinstance(client, openai.OpenAI)
    episode_id, parts = "", []
    try:
        stream = client.chat.completions.create(
            model=model,
            messages=messages,  # type: ignore[arg-type]
            user=getpass.getuser(),
            stream=True,
        )
        for chunk in stream:
            assert isinstance(chunk, ChatCompletionChunk)
            episode_id = chunk.id
            text = (chunk.choices[0].delta.content or "") if chunk.choices else ""
            parts.append(text)
            typer.echo(text, nl=False)
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        raise EverloopError(str(body.get("message", error)), code=str(error.code)) from error
    except openai.APIConnectionError as error:
        raise EverloopError("The API does not answer; is `everloop up` running?", code="api_down") from error
    typer.echo()
    return episode_id, "".join(parts)


def _rate(settings: Settings, episode_id: str | None, value: int) -> None:
    if episode_id is None:
        report.say("there is no answer to rate yet")
        return
    body = {
        "episode_id": episode_id,
        "user": getpass.getuser(),
        "kind": "thumb",
        "value": value,
        "idempotency_key": uuid.uuid4().hex,
    }
    url, headers = f"{settings.public_url}/v1/feedback", settings.credentials
    response = httpx.post(url, json=body, trust_env=False, headers=headers)
    report.say("noted" if response.status_code == 202 else response.text)
