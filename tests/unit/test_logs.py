"""Logs: JSON lines with ids, and never a secret or what a person said."""

import json
import logging
import subprocess
import sys

import pytest
from pydantic import BaseModel, ValidationError

from infra.errors import SetupError
from infra.settings import Settings
from infra.telemetry import logs

WORDS = "my marmalade recipe"
PASSWORD = "hunter2-hunter2"


@pytest.fixture
def logged(tmp_path, capsys):
    """Log through the whole set-up; return what came out."""
    kept = logging.root.handlers[:], logging.root.level

    def log(act, form="json", **settings):
        logs.setup(Settings(home=tmp_path, log_format=form, **settings))
        logging.root.handlers[0].setStream(sys.stderr)
        act(logging.getLogger("everloop.test"))
        return capsys.readouterr().err

    yield log
    logging.root.handlers[:], _ = kept
    logging.root.setLevel(kept[1])


@pytest.mark.parametrize(
    "said",
    [
        f"cannot reach postgresql+psycopg://everloop:{PASSWORD}@127.0.0.1:5432/everloop",
        f"refused: Authorization: Bearer {PASSWORD}",
        f"EVERLOOP_SOME_TOKEN={PASSWORD} is not taken",
        f'{{"secret": "{PASSWORD}", "key": 1}}',
        f"https://host/path?api_key={PASSWORD}&x=1",
        f"the bare {PASSWORD} of the database's address",
    ],
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_secret_is_not_logged_whatever_stands_around_it(logged, said, form):
    url = f"postgresql+psycopg://everloop:{PASSWORD}@127.0.0.1:5432/everloop"
    out = logged(lambda log: log.error("%s", said), form, database_url=url)
    assert out and PASSWORD not in out and "***" in out


def test_secrets_of_an_object_store_are_known_as_such(logged):
    options = {"key": "AKIA-not-so-public", "client_kwargs": {"secret": "deep-down-below", "region": "eu-north-1"}}
    out = logged(lambda log: log.error("AKIA-not-so-public deep-down-below eu-north-1"), adapters_options=options)
    assert "AKIA" not in out and "deep-down" not in out and "eu-north-1" in out


def test_keys_that_are_settings_are_known_as_such(logged):
    out = logged(
        lambda log: log.error("sk-service-key and oidc-secret"),
        service_key="sk-service-key",
        oidc_client_secret="oidc-secret",
    )
    assert out.count("***") == 2


def test_what_is_no_secret_stays(logged):
    said = "42 tokens: 7 of key everloop.feedback/2 at http://127.0.0.1:8000/v1, max_tokens: 16"
    assert said in logged(lambda log: log.warning(said), "text")


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_is_logged_by_its_frames_and_not_by_what_it_quotes(logged, form):
    class Body(BaseModel):
        value: int

    def act(log):
        try:
            try:
                Body(value=WORDS)
            except ValidationError:
                raise KeyError(WORDS)  # noqa: B904 (both are to be seen)
        except KeyError:
            log.exception("could not do %s", "it")

    out = logged(act, form)
    assert "marmalade" not in out
    assert "ValidationError" in out and "KeyError" in out and "test_logs.py" in out and "could not do it" in out


def test_messages_of_ours_and_of_the_system_are_kept(logged):
    def act(log):
        try:
            try:
                raise SetupError("Set EVERLOOP_HOME elsewhere.", code="no_disk")
            except SetupError as error:
                raise FileNotFoundError(2, "No such file", "/data/x") from error
        except FileNotFoundError:
            log.exception("failed")

    out = logged(act)
    assert "Set EVERLOOP_HOME elsewhere." in out and "/data/x" in out


def test_a_json_line_has_the_ids_that_its_message_names(logged):
    episode, run = f"ep_{'0af7' * 8}", "run_0123456789ab"
    line = json.loads(logged(lambda log: log.info("%s of %s: recorded", episode, run)))
    assert line["episode_id"] == episode and line["run_id"] == run
    assert line["level"] == "INFO" and line["logger"] == "everloop.test" and "T" in line["time"]
    assert line["message"] == f"{episode} of {run}: recorded" and "trace_id" not in line


def test_what_cannot_be_formatted_is_not_quoted(logged):
    line = json.loads(logged(lambda log: log.info("%d", WORDS)))
    assert "marmalade" not in str(line) and "test_logs.py" in line["message"]


def test_within_a_span_a_line_names_its_trace(tmp_path):
    code = f"""
import logging
from pathlib import Path
from infra.settings import Settings
from infra.telemetry import logs, tracing
settings = Settings(home=Path({str(tmp_path)!r}), log_format="json", otlp_url="http://127.0.0.1:9")
logs.setup(settings)
tracing.start(settings, "test")
with tracing.span("work") as hop:
    logging.getLogger("x").info("here")
print(hop.traceparent)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    line = json.loads(done.stderr.splitlines()[0])
    assert line["message"] == "here"
    assert done.stdout.split("-")[1:3] == [line["trace_id"], line["span_id"]]
