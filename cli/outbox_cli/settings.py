"""Flags and environment become the one `Config`; what commands share."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import update_wrapper
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import click
import orjson
from click.shell_completion import CompletionItem

from outbox.config import FILE_NAME, Config, Resolved, resolve
from outbox.database import Connection, connect, connect_as, place, translated
from outbox.entity_type import EntityType
from outbox.errors import ConfigError, OutboxError, UnknownTypeError, WrongOutboxError

F = TypeVar("F", bound=Callable[..., Any])

_GLOBAL = (
    click.option("--database-url", metavar="URL", help="The owning service's database. [OUTBOX_DATABASE_URL]"),
    click.option("--kafka-bootstrap-servers", metavar="HOST:PORT", help="Kafka. [OUTBOX_KAFKA_BOOTSTRAP_SERVERS]"),
    click.option("--schema", metavar="NAME", help="The outbox's schema; default outbox. [OUTBOX_SCHEMA]"),
    click.option("--name", metavar="NAME", help="The outbox's name: set where it is made, else checked. [OUTBOX_NAME]"),
    click.option("--config", "config_file", metavar="FILE", help=f"Settings; default ./{FILE_NAME}. [OUTBOX_CONFIG]"),
)


class Number(click.FloatRange):
    """A number within bounds; `nan` is none, though no comparison says so."""

    of: ClassVar[str]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is no number of {self.of}.", param, ctx)
        return number


class Seconds(Number):
    """A number of seconds."""

    of = "seconds"


class Rate(Number):
    """Rows a second."""

    name = "rate"
    of = "rows"


def global_options(function: F) -> F:
    """The flags that stand before or after the command."""
    for option in reversed(_GLOBAL):
        function = option(function)
    return function


@dataclass
class Settings:
    """What was given: flags by their names (None: not given), and the environment."""

    flags: dict[str, Any]
    environment: Mapping[str, str]
    debug: bool = False
    _resolved: Resolved | None = field(default=None, repr=False)

    def add(self, flags: Mapping[str, Any]) -> None:
        """Flags that stood after the command win."""
        self.flags.update({name: value for name, value in flags.items() if value is not None})
        self._resolved = None

    @property
    def resolved(self) -> Resolved:
        """The settings in force."""
        if self._resolved is None:
            flags = dict(self.flags)
            given = flags.pop("config_file", None) or self.environment.get("OUTBOX_CONFIG")
            file = Path(given) if given else Path(FILE_NAME)
            self._resolved = resolve(flags, self.environment, file, file_required=bool(given))
            if self._resolved.config.kafka:
                from outbox.kafka.settings import check_passthrough

                check_passthrough(self._resolved.config.kafka)
        return self._resolved

    @property
    def config(self) -> Config:
        """The settings in force."""
        return self.resolved.config

    def needs_database(self) -> Config:
        """The settings, of which the database is one."""
        if not self.config.database_url:
            raise ConfigError(
                "No database is named.",
                cure="Set OUTBOX_DATABASE_URL, or give --database-url postgresql://user@host:5432/database.",
            )
        place(self.config.database_url)
        return self.config

    def needs_kafka(self) -> Config:
        """The settings, of which Kafka is one; and the client library."""
        try:
            import confluent_kafka  # noqa: F401  only whether it is there
        except ImportError as error:
            raise ConfigError(
                "This command talks to Kafka, whose client is not installed.",
                cure="Install the extra `relay` too: pip install '.[relay]' in a checkout, or outbox-publisher[relay] "
                "from where this package came from.",
            ) from error
        if not self.config.kafka_bootstrap_servers:
            raise ConfigError(
                "No Kafka is named.", cure="Set OUTBOX_KAFKA_BOOTSTRAP_SERVERS, or give --kafka-bootstrap-servers."
            )
        return self.config

    def connect(self) -> Connection:
        """A connection to the database, which holds an outbox of the right version and name."""
        from outbox import schema

        config = self.needs_database()
        connection = connect_as(config, "outbox")
        try:
            with translated(place(config.database_url)):
                schema.require(connection, config.schema)
                name = outbox_row(connection, config.schema)[0]
            if config.name is not None and config.name != name:
                raise WrongOutboxError(
                    f'The outbox in {place(config.database_url)} is named "{name}", the settings say "{config.name}".',
                    cure="Correct OUTBOX_NAME (or --name), or the database URL: one of them points elsewhere.",
                )
        except BaseException:
            connection.close()
            raise
        return connection


def outbox_row(connection: Connection, schema: str) -> tuple[str, int]:
    """An outbox's name and its number of shards."""
    from outbox.schema import quote

    row = connection.execute(f"SELECT name, shards FROM {quote(schema)}.settings".encode()).fetchone()
    if row is None:
        raise ConfigError("The outbox has no settings.", cure="Create it anew: outbox migrate --name NAME.")
    return str(row[0]), int(row[1])


def find_type(connection: Connection, schema: str, name: str) -> EntityType:
    """An entity type by its name; `UnknownTypeError` when there is none."""
    from outbox.entity_types import read_types

    for entity_type in read_types(connection, schema):
        if entity_type.name == name:
            return entity_type
    raise UnknownTypeError(f'There is no entity type "{name}".', cure="See them: outbox types list.")


def with_settings(function: F) -> F:
    """Give a command the global flags after it too, and hand it the `Settings` first."""

    @global_options
    @click.option("--debug", is_flag=True, help="Show tracebacks.")
    @click.pass_context
    def wrapped(ctx: click.Context, /, debug: bool, **arguments: Any) -> Any:
        settings: Settings = ctx.ensure_object(Settings) if ctx.obj is None else ctx.obj
        settings.debug |= debug
        names = ("database_url", "kafka_bootstrap_servers", "schema", "name", "config_file")
        settings.add({name: arguments.pop(name, None) for name in names})
        return ctx.invoke(function, settings, **arguments)

    return update_wrapper(wrapped, function)  # type: ignore[return-value]  # the same call, less the first argument


class EntityTypeName(click.ParamType[str]):
    """The name of an entity type; a shell completes it from the database when that answers quickly."""

    name = "name"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin so; none when the database cannot be asked."""
        import os

        found = {name: value for level in (ctx.find_root(), ctx) for name, value in level.params.items() if value}
        names = ("database_url", "schema", "config_file")
        settings = Settings({name: found.get(name) for name in names}, dict(os.environ))
        try:
            config = settings.needs_database()
            with connect(config.database_url, connect_timeout=2, statement_timeout=1) as connection:
                from outbox.entity_types import read_types

                return [
                    CompletionItem(t.name)
                    for t in read_types(connection, config.schema)
                    if t.name.startswith(incomplete)
                ]
        except Exception:  # noqa: BLE001  whatever it is, a completion must not print it into the prompt
            return []


ENTITY_TYPE = EntityTypeName()

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


def print_json(value: object) -> None:
    """Print a value as one line of JSON."""
    click.echo(orjson.dumps(value, default=str).decode())


def confirm(question: str, *, yes: bool) -> None:
    """Ask on a terminal; elsewhere the answer must be given beforehand."""
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise click.UsageError("There is no terminal to ask on; give --yes to say that you mean it.")
    click.confirm(question, abort=True)


def table(headings: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    """Rows under headings, as aligned text; numbers to the right."""
    cells = [headings, *[tuple("" if cell is None else printable(cell) for cell in row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    numeric = [
        all(isinstance(row[column], int | float) for row in rows) and bool(rows) for column in range(len(widths))
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    )


def printable(value: object) -> str:
    """A value as a terminal may be given it: control characters are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def end_by_error(number: int, _frame: object) -> NoReturn:
    """A signal's handler: end by the way of errors, so that files, copies and other processes go."""
    sys.exit(128 + number)


def fail(code: int) -> NoReturn:
    """End with an exit code that is no error."""
    raise click.exceptions.Exit(code)


__all__ = [
    "ENTITY_TYPE",
    "OutboxError",
    "Settings",
    "confirm",
    "end_by_error",
    "fail",
    "find_type",
    "json_option",
    "outbox_row",
    "print_json",
    "printable",
    "table",
    "with_settings",
]
