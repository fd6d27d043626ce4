"""Log lines: for people on a terminal, JSON otherwise. No secret is ever logged."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

import orjson

from outbox.config import Config, mask_url


def scrub(text: str) -> str:
    """A text without the passwords that a driver may have put into its words."""
    return mask_url(text)


class HumanFormatter(logging.Formatter):
    """`12:00:01 WARNING waiting for kafka: ...`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback where there is one."""
        time = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S")
        line = f"{time} {record.levelname:7} {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return scrub(line)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `at`, `level`, `logger`, `message`, and of an event its name and fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": scrub(record.getMessage()),
        }
        event = getattr(record, "outbox_event", None)
        if event is not None:
            line["event"] = event
            fields: dict[str, object] = getattr(record, "outbox_fields", {})
            line |= {k: scrub(v) if isinstance(v, str) else v for k, v in fields.items() if k not in line}
        if record.exc_info:
            line["traceback"] = scrub(self.formatException(record.exc_info))
        return orjson.dumps(line, default=str).decode()


def configure(config: Config) -> None:
    """Send the package's log to standard error, in the form that the settings ask for."""
    human = config.log_format == "human" or (config.log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(HumanFormatter() if human else JsonFormatter())
    root = logging.getLogger("outbox")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(config.log_level.upper())
