"""Traces by OpenTelemetry, where `otlp_url` names a collector; where it does not, nothing is imported or kept.

A trace travels as W3C's ``traceparent``: in HTTP headers, in the CloudEvents attribute of that name, and in Kafka's
headers. Each hop makes a span of it and hands its own on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

from infra.settings import Settings

Kind = Literal["INTERNAL", "SERVER", "PRODUCER", "CONSUMER"]
HEADER = "traceparent"
EXPORT_EVERY_MS = 1000
EXPORT_TIMEOUT_S = 2.0  # a collector that is away must not keep a process from ending
MAX_LINKS = 100
_FORM = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_provider: Any = None  # of this process, once it was started


class Hop:
    """A span that is ended by hand; what :func:`begin` returns where there is a trace."""

    def __init__(self, span: Any) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """What the next hop goes on from."""
        return _written(self._span.get_span_context())

    def rename(self, name: str) -> None:
        """Call it otherwise: what a request is for is known when it has found its route."""
        self._span.update_name(name)

    def note(self, **attributes: Any) -> None:
        """Add attributes; dots are written as double underscores."""
        self._span.set_attributes(_dotted(attributes))

    def end(self, error: BaseException | str | None = None) -> None:
        """End it. Of an error its type is kept: its message may quote what a person said."""
        if error is not None:
            from opentelemetry.trace import StatusCode

            told = error if isinstance(error, str) else getattr(error, "code", type(error).__name__)
            self._span.set_status(StatusCode.ERROR, told)
        self._span.end()


def start(settings: Settings, part: str) -> None:
    """Send this process's spans to the collector that the settings name, if they name one; safe to repeat.

    Parameters
    ----------
    part
        What the process is called in traces, after ``everloop-``.
    """
    global _provider
    if settings.otlp_url is None or _provider is not None:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    _provider = TracerProvider(
        resource=Resource.create({"service.name": f"everloop-{part}", "service.namespace": "everloop"}),
        sampler=ParentBased(TraceIdRatioBased(settings.trace_share)),
    )
    exporter = OTLPSpanExporter(f"{settings.otlp_url.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S)
    _provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_EVERY_MS))


def stop() -> None:
    """Send what is not sent yet, and make no more spans."""
    global _provider
    if _provider is not None:
        _provider.shutdown()
        _provider = None


def is_on() -> bool:
    """Tell whether this process makes spans."""
    return _provider is not None


def traceparent() -> str | None:
    """Return what names the current span; None outside of any."""
    if _provider is None:
        return None
    from opentelemetry.trace import get_current_span

    context = get_current_span().get_span_context()
    return _written(context) if context.is_valid else None


def valid(text: object) -> str | None:
    """Return a ``traceparent`` that can be gone on from; None for anything else: anybody may have written it."""
    return text if isinstance(text, str) and _FORM.fullmatch(text) else None


def span(
    name: str,
    kind: Kind = "INTERNAL",
    parent: str | None = None,
    **attributes: Any,
) -> AbstractContextManager[Hop | None]:
    """Make a span for the length of the block, under `parent` or else the current one; None where tracing is off.

    Parameters
    ----------
    attributes
        With ``__`` for dots: ``everloop__episode`` is ``everloop.episode``.
    """
    return nullcontext() if _provider is None else _span(name, kind, parent, attributes)


@contextmanager
def _span(name: str, kind: Kind, parent: str | None, attributes: Mapping[str, Any]) -> Iterator[Hop]:
    from opentelemetry.trace import use_span

    hop = _begin(name, kind, parent, attributes)
    try:
        with use_span(hop._span, end_on_exit=False, record_exception=False, set_status_on_exception=False):
            yield hop
    except BaseException as error:
        hop.end(error)
        raise
    hop.end()


def begin(name: str, kind: Kind = "INTERNAL", parent: str | None = None, **attributes: Any) -> Hop | None:
    """Begin a span that is ended by hand and is nobody's current one; None where tracing is off."""
    return None if _provider is None else _begin(name, kind, parent, attributes)


def within(parent: str | None) -> AbstractContextManager[None]:
    """Make what happens in the block a part of the trace of `parent`."""
    return nullcontext() if _provider is None or parent is None else _within(parent)


@contextmanager
def _within(parent: str) -> Iterator[None]:
    from opentelemetry.context import attach, detach

    token = attach(_context(parent))
    try:
        yield
    finally:
        detach(token)


def note(**attributes: Any) -> None:
    """Add attributes to the current span, with ``__`` for dots."""
    if _provider is not None:
        from opentelemetry.trace import get_current_span

        get_current_span().set_attributes(_dotted(attributes))


def link(others: Sequence[str]) -> None:
    """Note that the current span follows from spans of other traces, too."""
    if _provider is not None:
        from opentelemetry.trace import get_current_span

        for one in others[:MAX_LINKS]:
            get_current_span().add_link(get_current_span(_context(one)).get_span_context())


def _begin(name: str, kind: Kind, parent: str | None, attributes: Mapping[str, Any]) -> Hop:
    from opentelemetry.trace import SpanKind

    tracer = _provider.get_tracer("everloop")
    context = None if parent is None else _context(parent)
    return Hop(tracer.start_span(name, context, SpanKind[kind], _dotted(attributes)))


def _context(parent: str) -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({HEADER: parent})


def _written(context: Any) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _dotted(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in attributes.items() if value is not None}
