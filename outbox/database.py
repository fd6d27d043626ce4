"""Connections to PostgreSQL, and its errors in words that name the cure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol

import psycopg
from psycopg import errors as pg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from outbox.config import Config, mask_url
from outbox.errors import (
    ConfigError,
    DatabaseError,
    DatabaseUnavailableError,
    OutboxError,
    SchemaError,
    UnsuitableServerError,
)

# What libpq says of a parameter before it has tried to connect.
_OF_LOGINS = ("password", "authentication", "no pg_hba.conf entry", "not permitted to log in")
_UNUSABLE = re.compile(r"invalid (\w+ value|port number|integer value|connection option)|root certificate file")

Connection = psycopg.Connection[tuple[Any, ...]]

# A server that vanished without a word is noticed within this time, in seconds, also while nothing is sent.
_KEEPALIVE: dict[str, Any] = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}


def libpq_url(url: str) -> str:
    """Accept SQLAlchemy's `postgresql+psycopg://` as well as libpq's own forms."""
    scheme, found, rest = url.partition("://")
    if found and scheme.startswith(("postgresql+", "postgres+")):
        return f"postgresql://{rest}"
    return url


def place(url: str) -> str:
    """Where a URL points, without user or password: `host:port/database`."""
    authority, _, path = libpq_url(url).partition("://")[2].partition("?")[0].partition("/")
    if authority.count("@") > 1 or "@" in path:
        # libpq would take a part of the password for the host, and everybody would print it.
        raise ConfigError(
            "The database URL cannot be read: its user or password holds an @ or a / that is not escaped.",
            cure="Write %40 for @, %2F for / and %3A for a colon; set OUTBOX_DATABASE_URL.",
        )
    try:
        parts = conninfo_to_dict(libpq_url(url))
    except psycopg.ProgrammingError as error:
        raise ConfigError(
            f"The database URL cannot be read: {mask_url(str(error).strip())}.",
            cure="It looks like postgresql://user:password@host:5432/database; set OUTBOX_DATABASE_URL.",
        ) from error
    return f"{parts.get('host', 'localhost')}:{parts.get('port', 5432)}/{parts.get('dbname', '')}"


class Patient(Protocol):
    """Watches calls that may go unanswered; see `outbox.patience.Patience`."""

    def call(self, connection: Connection) -> AbstractContextManager[None]:
        """Watch what happens inside."""


def connect_as(
    config: Config, application_name: str, *, statement_timeout: float | None = None, patience: Patient | None = None
) -> Connection:
    """Connect as the settings say; `statement_timeout` in seconds goes over theirs (0: none)."""
    return connect(
        config.database_url,
        application_name=application_name,
        connect_timeout=config.connect_timeout,
        statement_timeout=config.statement_timeout if statement_timeout is None else statement_timeout,
        patience=patience,
    )


def connect(
    url: str,
    *,
    application_name: str = "outbox",
    connect_timeout: int = 10,
    statement_timeout: float = 60,
    patience: Patient | None = None,
) -> Connection:
    """Open a connection in autocommit mode; times in seconds.

    Raises `DatabaseUnavailableError` when trying again may help, `DatabaseError` when it does not,
    `ConfigError` for a URL that cannot be read.
    """
    where = place(url)
    with translated(where):
        connection = psycopg.connect(
            libpq_url(url),
            autocommit=True,
            application_name=application_name,
            connect_timeout=connect_timeout,
            # Whatever the environment says: keys and headers go on as UTF-8.
            client_encoding="UTF8",
            **_KEEPALIVE,
        )
        # A client-side setting would be an option of the URL; this one holds for any role and any server.
        # A server may answer until here and then no more.
        with patience.call(connection) if patience is not None else nullcontext():
            connection.execute(
                sql.SQL("SET statement_timeout = {}").format(sql.Literal(round(statement_timeout * 1000)))
            )
    return connection


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn errors of psycopg into the project's; `where` names the server and database."""
    try:
        yield
    except psycopg.Error as error:
        raise translate(error, where) from error


def translate(error: psycopg.Error, where: str) -> OutboxError:
    """The project's error for one of psycopg's."""
    said = (error.diag.message_primary or str(error)).strip().splitlines()[0] if str(error) else "no reason given"
    match error:
        case pg.InvalidPassword() | pg.InvalidAuthorizationSpecification():
            return DatabaseError(
                f"PostgreSQL at {where} refused the login: {said}.",
                cure="Check the user and the password in OUTBOX_DATABASE_URL.",
            )
        case pg.InvalidCatalogName():
            return DatabaseError(
                f"PostgreSQL at {where} has no such database: {said}.",
                cure="Check the database's name in OUTBOX_DATABASE_URL, or create it.",
            )
        case pg.InsufficientPrivilege():
            return DatabaseError(
                f"PostgreSQL at {where} denied it: {said}.",
                cure="Grant the role what it needs: op.outbox_grant(...) in a migration, or outbox migrate "
                "--writer ROLE --relay ROLE.",
            )
        case pg.UndefinedTable() | pg.InvalidSchemaName() | pg.UndefinedFunction() | pg.UndefinedColumn():
            return SchemaError(
                f"The outbox is not in {where}: {said}.",
                cure="Create it: outbox migrate --name NAME, or, in a service with Alembic, outbox revision and "
                "alembic upgrade head.",
            )
        case pg.ReadOnlySqlTransaction():
            return UnsuitableServerError(
                f"PostgreSQL at {where} is read-only: {said}.",
                cure="Point OUTBOX_DATABASE_URL at the primary.",
            )
        case pg.ObjectNotInPrerequisiteState() if "recovery" in said:
            return UnsuitableServerError(
                f"PostgreSQL at {where} is a standby: {said}.",
                cure="Point OUTBOX_DATABASE_URL at the primary; a standby's snapshot leaves out running transactions.",
            )
        case pg.QueryCanceled() | pg.LockNotAvailable():
            return DatabaseUnavailableError(
                f"PostgreSQL at {where} did not answer in time: {said}.",
                cure="Look for what holds it up: SELECT * FROM pg_stat_activity WHERE wait_event_type = 'Lock'.",
            )
        case psycopg.OperationalError() | psycopg.InterfaceError():
            return _not_connected(error, where)
        case _:
            return DatabaseError(f"PostgreSQL at {where} answered with an error: {said} ({error.sqlstate}).")


def _not_connected(error: psycopg.Error, where: str) -> OutboxError:
    """What libpq says, without a code: the words tell whether trying again may help."""
    if _UNUSABLE.search(str(error)):
        return ConfigError(
            f"The database URL (of {where}) cannot be used: {_last(error)}.",
            cure="Correct OUTBOX_DATABASE_URL; the parameters are libpq's.",
        )
    if is_refused(error) == "login":
        return DatabaseError(
            f"PostgreSQL at {where} refused the login: {_last(error)}.",
            cure="Check the user and the password in OUTBOX_DATABASE_URL.",
        )
    if is_refused(error) == "database":
        return DatabaseError(
            f"PostgreSQL at {where} has no such database: {_last(error)}.",
            cure="Check the database's name in OUTBOX_DATABASE_URL, or create it.",
        )
    return DatabaseUnavailableError(
        f"PostgreSQL at {where} cannot be reached: {_last(error)}.",
        cure="Check that it runs and that OUTBOX_DATABASE_URL points at it.",
    )


def is_refused(error: psycopg.Error) -> Literal["login", "database"] | None:
    """What of a connection the server has refused, which libpq says in words alone; None: it is another error."""
    said = str(error)
    gone = "does not exist" in said
    if any(word in said for word in _OF_LOGINS) or ('role "' in said and gone):
        return "login"
    return "database" if 'database "' in said and gone else None


def _last(error: psycopg.Error) -> str:
    # libpq lists every address that it tried and every attempt; the last one says it.
    # Its advice ("Is the server running ...?") comes after that, and our own is better.
    lines = [
        line.strip()
        for line in str(error).splitlines()
        if line.strip() and "Multiple" not in line and not line.strip().startswith("Is the server running")
    ]
    text = lines[-1] if lines else "no reason given"
    return text.rpartition("failed: ")[2].removeprefix("FATAL:").strip().rstrip(".?") or text
