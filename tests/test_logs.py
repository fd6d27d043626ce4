"""Log lines: for people or as JSON, never with a secret, and every event from the catalogue."""

from __future__ import annotations

import ast
import json
import logging
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import outbox
from outbox import logs
from outbox.config import Config
from outbox.telemetry import EVENTS, emit

SECRET = "s3kret"
log = logging.getLogger("outbox.test")


@pytest.fixture
def stream(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Gives what was written to standard error since it was last asked."""
    root = logging.getLogger("outbox")
    before = (root.handlers[:], root.propagate, root.level)
    yield lambda: capsys.readouterr().err
    root.handlers[:], root.propagate = before[0], before[1]
    root.setLevel(before[2])


def test_without_a_terminal_an_event_is_one_json_object(stream: Callable[[], str]) -> None:
    """Its name and its fields are there to be filtered by."""
    logs.configure(Config())
    emit(log, "relay.adopted", epoch=7, entries=2)
    line = json.loads(stream())
    assert (line["event"], line["entries"], line["epoch"], line["level"]) == ("relay.adopted", 2, 7, "warning")
    assert line["message"] == "the log was adopted: epoch 7, 2 entries are published again"


def test_log_format_human_writes_sentences(stream: Callable[[], str]) -> None:
    """The setting turns the form, whatever the output is."""
    logs.configure(Config(log_format="human"))
    emit(log, "relay.adopted", epoch=7, entries=2)
    assert stream().rstrip().endswith("WARNING the log was adopted: epoch 7, 2 entries are published again")


def test_log_level_decides_what_is_said(stream: Callable[[], str]) -> None:
    """`error` leaves warnings out."""
    logs.configure(Config(log_level="error"))
    emit(log, "relay.adopted", epoch=7, entries=2)
    assert stream() == ""


@pytest.mark.parametrize("form", ["human", "json"])
def test_no_line_holds_a_password(stream: Callable[[], str], form: str) -> None:
    """Not in a message, not in a field, not in a traceback."""
    logs.configure(Config(log_format=form))
    url = f"postgresql://u:{SECRET}@h/d"
    emit(log, "relay.waiting", shard=0, what="database", error=f"cannot reach {url}", cure=f"password='x {SECRET}'")
    try:
        raise RuntimeError(f"host=h password={SECRET}")
    except RuntimeError:
        log.exception("failed with %s", url)
    written = stream()
    assert "***" in written
    assert SECRET not in written


def _emitted() -> Iterator[tuple[str, str, set[str]]]:
    """Every call of `emit` in the packages: where, which event, which fields."""
    package = Path(outbox.__file__).parent
    for file in [*package.rglob("*.py"), *(package.parent / "cli").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "emit":
                name = node.args[1]
                assert isinstance(name, ast.Constant), f"{file}:{node.lineno}: the event's name is computed"
                yield f"{file.name}:{node.lineno}", str(name.value), {str(k.arg) for k in node.keywords}


def test_every_event_that_is_emitted_is_in_the_catalogue_with_its_fields() -> None:
    """And none is in the catalogue that nobody emits."""
    emitted = list(_emitted())
    for where, name, given in emitted:
        assert name in EVENTS, where
        fields = {field.split(".")[0] for _, field, _, _ in string.Formatter().parse(EVENTS[name].text) if field}
        assert fields <= given, where
    assert {name for _, name, _ in emitted} == set(EVENTS)
