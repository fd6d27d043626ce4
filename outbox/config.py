"""The settings: one frozen value, checked once, passed down.

Only the command line reads the environment and files; it calls `resolve`. Precedence: flag over environment over
`outbox.toml` over default. docs/configuration.md is compared with `SETTINGS` by a test.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from outbox.errors import ConfigError

FILE_NAME = "outbox.toml"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its name, what it means, how its text is read, and whether it is shown.

    `read` turns the text of a flag or variable, or the value of a file, into the setting's type; `ValueError` when
    it cannot, with the words that say what is allowed.
    """

    name: str
    help: str
    read: Callable[[Any], Any]
    secret: bool = False

    @property
    def variable(self) -> str:
        """The environment variable."""
        return f"OUTBOX_{self.name.upper()}"


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not empty")
    return value.strip()


_SERVER = re.compile(
    r"((PLAINTEXT|SSL|SASL_PLAINTEXT|SASL_SSL)://)?(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?", re.IGNORECASE
)


def _servers(value: Any) -> str:
    servers = [server.strip() for server in value.split(",")] if isinstance(value, str) else []
    if not servers or not all(_SERVER.fullmatch(server) for server in servers):
        raise ValueError("host:port, several with commas between")
    return ",".join(servers)


def _whole(least: int, most: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return number

    return read


def _seconds(least: float, most: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1.0
        if isinstance(value, bool) or not least <= number <= most:
            raise ValueError(f"seconds from {least:g} to {most:g}")
        return number

    return read


def _one_of(*words: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        word = str(value).strip().lower()
        if word not in words:
            raise ValueError("one of " + ", ".join(words))
        return word

    return read


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in {"on", "true", "yes", "1"}:
        return True
    if word in {"off", "false", "no", "0"}:
        return False
    raise ValueError("on or off")


def _table(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ValueError("a table of librdkafka properties")  # noqa: TRY004  becomes a ConfigError
    flat: dict[str, str] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            # TOML reads a dotted key as a table in a table.
            flat.update({f"{name}.{rest}": text for rest, text in _table(inner).items()})
        else:
            flat[str(name)] = str(inner).lower() if isinstance(inner, bool) else str(inner)
    return flat


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "database_url", "The owning service's database: a libpq URL, or postgresql+psycopg://.", _text, secret=True
    ),
    Setting("kafka_bootstrap_servers", "Kafka's first brokers, host:port with commas.", _servers),
    Setting("schema", "The schema that holds the outbox.", _text),
    Setting("name", "What the outbox must be named. Checked, never set: the name is made with the outbox.", _text),
    Setting("shard", "Which shard this relay publishes.", _whole(0, 1023)),
    Setting("batch_rows", "Most entries in one batch.", _whole(1, 1_000_000)),
    Setting("batch_bytes", "Most bytes of states in one batch; one entry always fits.", _whole(1, 2**31)),
    Setting(
        "poll_interval", "Seconds between two looks of a sleeping relay that nobody rings.", _seconds(0.01, 86_400)
    ),
    Setting(
        "busy_poll_interval",
        "Seconds between a batch and the next look, and between two looks while a writer holds the doorbell; looks "
        "in vain come up to ten times as seldom.",
        _seconds(0.001, 60),
    ),
    Setting("transaction_timeout", "Seconds after which Kafka ends an open transaction.", _seconds(1, 900)),
    Setting("connect_timeout", "Seconds to wait for a connection to PostgreSQL.", _whole(2, 600)),
    Setting("statement_timeout", "Seconds that a statement of the relay may take.", _seconds(0.1, 3600)),
    Setting(
        "lock_timeout", "Seconds that adoption and pruning wait for a lock; writers wait no longer.", _seconds(0.01, 60)
    ),
    Setting("lock_tries", "How often adoption tries to get its lock.", _whole(1, 10_000)),
    Setting(
        "on_lost_tail", "What to do when the database lost published entries: adopt or stop.", _one_of("adopt", "stop")
    ),
    Setting("prune", "Whether the relay prunes the ring by itself.", _switch),
    Setting("prune_interval", "Seconds between two prunings by the relay.", _seconds(1, 86_400)),
    Setting(
        "topic_check_interval",
        "Seconds between two looks at the topics' settings while there is something to publish.",
        _seconds(0.1, 86_400),
    ),
    Setting("max_dead_letters", "Dead letters of a shard beyond which the relay stops.", _whole(0, 10_000_000)),
    Setting("replication_factor", "Replication factor of topics that are made.", _whole(1, 100)),
    Setting("backoff_max", "Longest pause, seconds, between two tries while a server is away.", _seconds(0.05, 600)),
    Setting(
        "log_format",
        "How log lines look: auto (people on a terminal), human or json.",
        _one_of("auto", "human", "json"),
    ),
    Setting("log_level", "The least level that is logged.", _one_of("debug", "info", "warning", "error")),
    Setting(
        "kafka", "Properties passed through to librdkafka (TLS, SASL, ...); only in outbox.toml.", _table, secret=True
    ),
)

BY_NAME: Mapping[str, Setting] = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True, slots=True)
class Config:
    """The settings in force. Times in seconds, sizes in bytes; `SETTINGS` says what each means."""

    database_url: str = ""
    kafka_bootstrap_servers: str = ""
    schema: str = "outbox"
    name: str | None = None
    shard: int = 0
    batch_rows: int = 20_000
    batch_bytes: int = 16 * 1024 * 1024
    poll_interval: float = 2.0
    busy_poll_interval: float = 0.002
    transaction_timeout: float = 60.0
    connect_timeout: int = 10
    statement_timeout: float = 60.0
    lock_timeout: float = 2.0
    lock_tries: int = 30
    on_lost_tail: str = "adopt"
    prune: bool = False
    prune_interval: float = 60.0
    topic_check_interval: float = 60.0
    max_dead_letters: int = 10_000
    replication_factor: int = 3
    backoff_max: float = 10.0
    log_format: str = "auto"
    log_level: str = "info"
    kafka: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A `Config`, and for each setting where its value comes from, in words."""

    config: Config
    sources: Mapping[str, str]


def resolve(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None, *, file_required: bool = False
) -> Resolved:
    """Put the settings together and check each; `ConfigError` names the setting, its source and what is allowed.

    `flags` holds what was given on the command line (None: not given); `file` is looked at when it exists.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {f.name: "default" for f in fields(Config)}
    if file is not None and (file_required or file.is_file()):
        for name, value in _read_file(file).items():
            _put(values, sources, name, value, str(file))
    for variable, text in environment.items():
        if not variable.startswith("OUTBOX_") or variable == "OUTBOX_CONFIG" or not text:
            continue
        name = variable.removeprefix("OUTBOX_").lower()
        if name == "kafka" or name not in BY_NAME:
            # Other programs of the owner may use the prefix too; a mistyped name is said by `outbox config`.
            continue
        _put(values, sources, name, text, f"environment, {variable}")
    for name, value in flags.items():
        if value is not None:
            _put(values, sources, name, value, f"flag --{name.replace('_', '-')}")
    return Resolved(Config(**values), sources)


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Variables that look like ours and are none, each with the name that was likely meant."""
    known = [setting.variable for setting in SETTINGS if setting.name != "kafka"] + ["OUTBOX_CONFIG"]
    return {
        variable: next(iter(difflib.get_close_matches(variable, known, 1)), None)
        for variable in environment
        if variable.startswith("OUTBOX_") and variable not in known
    }


def masked(name: str, value: object) -> object:
    """A setting's value as it may be shown: no password, no key."""
    if name == "database_url":
        return mask_url(str(value))
    return value


# Greedy up to the last @: a password with an unescaped @ must not show half of itself.
_PASSWORD_IN_URL = re.compile(r"(\b[\w+]+://[^\s:/?@]*:)\S+@")
# As in libpq's key-value strings (quoted where it holds a space) and in a URL's query.
_PASSWORD_WORD = re.compile(r"(password|passphrase|secret)(\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&]+)", re.IGNORECASE)


def mask_url(text: str) -> str:
    """A URL, a libpq key-value string, or any text that may hold one, without its passwords."""
    return _PASSWORD_WORD.sub(r"\1\2***", _PASSWORD_IN_URL.sub(r"\1***@", text))


def _read_file(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"The settings file {file} is not there.", cure="Correct --config or OUTBOX_CONFIG."
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The settings file {file} cannot be read: {error}.", cure="Mend it; it is TOML.") from error


def _put(values: dict[str, Any], sources: dict[str, str], name: str, value: object, source: str) -> None:
    setting = BY_NAME.get(name)
    if setting is None:
        near = difflib.get_close_matches(name, BY_NAME, 1)
        raise ConfigError(
            f'There is no setting "{name}" ({source}).',
            cure=f'Did you mean "{near[0]}"?' if near else "See them all: outbox config.",
        )
    try:
        values[name] = setting.read(value)
    except ValueError as error:
        shown = "" if setting.secret or "@" in str(value) else f" {value!r}"
        raise ConfigError(
            f"The setting {name}{shown} ({source}) cannot be used.", cure=f"It must be {error}."
        ) from error
    sources[name] = source
