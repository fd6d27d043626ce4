"""What is said once for a block of work: the cause, the trace, and headers of every entry that it writes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from outbox.errors import HeadersError

TRACEPARENT = "traceparent"

# The relay sets these itself.
_RESERVED = frozenset({"outbox-id", "content-type", "cause"})

# https://www.w3.org/TR/trace-context/#traceparent-header - later versions may append fields.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")

_CURE = 'Pass text by text, for example headers={"tenant": "7"}.'


@dataclass(frozen=True, slots=True)
class _Current:
    cause: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


_NOTHING = _Current()
_current: ContextVar[_Current] = ContextVar("outbox_context", default=_NOTHING)


@contextmanager
def context(
    *, cause: str | None = None, traceparent: str | None = None, headers: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Give every entry written inside the block a cause, a trace context, headers.

    What a call passes itself goes before; an inner block adds to the outer one and goes before it. The block belongs
    to the current thread or asyncio task (and to tasks started inside).

    `cause`: a word that says why the state changed. `traceparent`: as in W3C Trace Context; left out, the current
    span of OpenTelemetry is taken, if there is one. Raises `HeadersError`.
    """
    given = check_headers(headers, "outbox.context") or {}
    if traceparent is not None:
        given[TRACEPARENT] = traceparent
        check_headers(given, "outbox.context")
    check_cause(cause, "outbox.context")
    outer = _current.get()
    token = _current.set(_Current(outer.cause if cause is None else cause, {**outer.headers, **given}))
    try:
        yield
    finally:
        _current.reset(token)


def in_force(
    cause: str | None, headers: Mapping[str, str] | None, whose: str
) -> tuple[str | None, dict[str, str] | None]:
    """The cause and the headers of an entry: its own, then the block's, then the trace of the current span.

    `whose` names the entity in errors. Raises `HeadersError`.
    """
    current = _current.get()
    check_cause(cause, whose)
    own = check_headers(headers, whose)
    merged = {**current.headers, **own} if own else dict(current.headers)
    if TRACEPARENT not in merged:
        trace = _open_telemetry()
        if trace is not None:
            merged[TRACEPARENT] = trace
    return current.cause if cause is None else cause, merged or None


def check_headers(headers: object, whose: str) -> dict[str, str] | None:
    """A copy of the headers, or None when there are none. Raises `HeadersError`."""
    if headers is None:
        return None
    if not isinstance(headers, Mapping):
        raise HeadersError(f"The headers of {whose} are a {headers.__class__.__qualname__}, no mapping.", cure=_CURE)
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str) or not name:
            raise HeadersError(f"The headers of {whose} hold {name!r}: {value!r:.100}, which is not text.", cure=_CURE)
        if name in _RESERVED:
            raise HeadersError(
                f'The headers of {whose} hold "{name}", which the relay sets itself.',
                cure="Leave it out; cause and content_type are arguments of their own.",
            )
        _check_text(name, whose)
        _check_text(value, whose)
        if name == TRACEPARENT and not _TRACEPARENT.fullmatch(value):
            raise HeadersError(
                f"The traceparent of {whose} is {value!r:.100}, which is none.",
                cure="It looks like 00-<32 hexadecimal digits>-<16 hexadecimal digits>-01; leave it out when there is "
                "no trace.",
            )
    return dict(headers)


def check_cause(cause: object, whose: str) -> None:
    """Raises `HeadersError` when the cause is neither None nor text that PostgreSQL can store."""
    if cause is None:
        return
    if not isinstance(cause, str):
        raise HeadersError(
            f"The cause of {whose} is a {cause.__class__.__qualname__}, not text.", cure='Pass a word: cause="moved".'
        )
    _check_text(cause, whose)


def _check_text(text: str, whose: str) -> None:
    if text.isascii() and "\x00" not in text:
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise HeadersError(
            f"A header of {whose} holds a lone surrogate: {text!r:.100}.", cure="Pass valid text."
        ) from error
    if "\x00" in text:
        raise HeadersError(
            f"A header of {whose} holds a NUL character: {text!r:.100}.", cure="PostgreSQL stores none in text."
        )


def _open_telemetry() -> str | None:
    # A program that has a span has imported the module; importing it here would cost every other program.
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        return None
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
