"""The log of a process: text or JSON lines, with ids, and never what a person said or a secret.

What people say gets into a log by two ways: somebody logs it, which no statement of ours does, or an exception
quotes it. So of exceptions only those keep their message whose messages are ours or the system's.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Literal
from urllib.parse import unquote, urlsplit

from infra.errors import EverloopError
from infra.settings import Settings
from infra.telemetry import tracing

HIDDEN = "***"
MIN_SECRET_CHARS = 6  # shorter ones would hide parts of words
TOLD = (EverloopError, OSError, ImportError, NameError, AttributeError)  # their messages quote no data
_IDS = re.compile(r"\b(ep|fb|ev|run)_[0-9a-f]{12,32}\b")
_ID_NAMES = {"ep": "episode_id", "fb": "feedback_id", "ev": "event_id", "run": "run_id"}
_USERINFO = re.compile(r"(\w[\w+.-]*://[^\s:/@]*:)[^\s@/]+(@)")
_AUTHORIZATION = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]+")
_NAMED = re.compile(
    r"(?i)([\w-]*(?:password|passwd|secret|token|api[_-]?key|cookie)[\"']?\s*[:=]\s*[\"']?)(?!\d+\b)[^\s\"',;}&]+"
)
_SECRET_NAME = re.compile(r"(?i)(^|_)(key|secret|token|password)$")
_COMPILED = ((_USERINFO, rf"\1{HIDDEN}\2"), (_AUTHORIZATION, rf"\1 {HIDDEN}"), (_NAMED, rf"\1{HIDDEN}"))


def setup(settings: Settings | None = None, level: int = logging.INFO) -> None:
    """Log to standard error, as the settings say; as text without any."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Redaction(secrets_of(settings) if settings else ()))
    handler.setFormatter(_formatter(settings.log_format if settings else "text"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    for noisy in ("kafka", "httpx", "httpcore", "alembic", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # A collector that is away is told once for each batch that is lost, not for each try.
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)
    # Warns about every callback over 0.1 s, which computing a feature always is.
    logging.getLogger("kafka.net.selector").setLevel(logging.ERROR)


def _formatter(form: Literal["text", "json"]) -> logging.Formatter:
    if form == "text":
        formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    else:
        from pythonjsonlogger.orjson import OrjsonFormatter

        formatter = OrjsonFormatter(
            ["levelname", "name", "message"],
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
            timestamp="time",
        )
    setattr(formatter, "formatException", stack)  # noqa: B010 (mypy takes no method for a function)
    return formatter


ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def stack(exc_info: ExcInfo) -> str:
    """Return an exception's stack and those of its causes, without messages that may quote a person."""
    error = exc_info[1]
    told = [] if error is None else _stack(error)
    return redacted("\n".join(told))


def _stack(error: BaseException, depth: int = 0) -> list[str]:
    lines = []
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and depth < 5:
        lines += [*_stack(before, depth + 1), "", "then:", ""]
    lines += [line.rstrip("\n") for line in traceback.format_tb(error.__traceback__)]
    name = type(error).__name__
    lines.append(f"{name}: {error}" if isinstance(error, TOLD) else name)
    if isinstance(error, BaseExceptionGroup) and depth < 5:
        for one in error.exceptions:
            lines += [f"of {name}:", *_stack(one, depth + 1)]
    return lines


class Redaction(logging.Filter):
    """Takes secrets out of what is logged, and puts the ids in it, and those of its trace, beside it as fields.

    Parameters
    ----------
    secrets
        Texts that must not be seen, whatever stands before them.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self.secrets = sorted((s for s in secrets if len(s) >= MIN_SECRET_CHARS), key=len, reverse=True)

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; every one passes."""
        try:
            text = record.getMessage()
        except Exception:  # logging says so itself, and quotes the arguments
            text = f"{record.pathname}:{record.lineno} logs what it cannot format"
        record.msg, record.args = redacted(text, self.secrets), None
        for found in _IDS.finditer(text):
            setattr(record, _ID_NAMES[found[1]], found[0])
        if (parent := tracing.traceparent()) is not None:
            _, record.trace_id, record.span_id, _ = parent.split("-")
        return True


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a text without what looks like a secret, and without the given ones."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    for pattern, instead in _COMPILED:
        text = pattern.sub(instead, text)
    return text


def secrets_of(settings: Settings) -> list[str]:
    """Return the secrets that settings hold: passwords within addresses, and what is given to an object store."""
    return list(_secrets(settings.model_dump()))


def _secrets(named: Mapping[str, object]) -> Iterator[str]:
    """Yield the texts that are named as secrets are, and the passwords within addresses."""
    for name, value in named.items():
        if isinstance(value, dict):
            yield from _secrets(value)
        elif isinstance(value, str) and _SECRET_NAME.search(name):
            yield value
        elif isinstance(value, str) and "://" in value:
            password = urlsplit(value).password
            yield from (password, unquote(password)) if password else ()
