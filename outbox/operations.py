"""Alembic operations: `import outbox.operations` in a revision, then `op.outbox_create(...)` and its sisters.

They work online, offline (`--sql`), up and down, and never go through `text()`, which would eat the colons in
function bodies. Importing this module also keeps autogenerate and `alembic check` from wanting to drop our tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import orjson
from alembic.autogenerate import comparators
from alembic.autogenerate.api import AutogenContext
from alembic.operations import MigrateOperation, Operations
from alembic.operations.ops import DropIndexOp, DropTableOp, ModifyTableOps, UpgradeOps
from alembic.util import DispatchPriority, msg
from sqlalchemy import exc

from outbox import capture as _capture
from outbox.equality import check_comparison
from outbox.errors import (
    CaptureError,
    ConfigError,
    DatabaseError,
    OutboxError,
    SchemaError,
    UnknownTypeError,
    WrongOutboxError,
)
from outbox.schema import (
    NEWEST,
    Settings,
    create_schema,
    do,
    drop_schema,
    grants,
    literal,
    quote,
    statements_down,
    statements_up,
)
from outbox.topic import check_settings


class _Statements(MigrateOperation):
    """An operation that is nothing but statements, and maybe a look beforehand.

    `refused`: the class of error for what the statements refuse by an SQLSTATE of the outbox; None: by that state.
    """

    def __init__(
        self,
        statements: Iterable[str],
        look: Callable[[Any], None] | None = None,
        *,
        schema: str,
        refused: type[OutboxError] | None = None,
    ) -> None:
        self.statements = statements
        self.look = look
        self.schema = schema
        self.refused = refused


@Operations.implementation_for(_Statements)
def _run(operations: Operations, operation: _Statements) -> None:
    context = operations.get_context()
    if context.as_sql:
        for statement in operation.statements:
            context.impl.static_output(statement + ";\n")
        return
    bind = operations.get_bind()
    try:
        if operation.look is not None:
            operation.look(bind)
        for statement in operation.statements:
            bind.exec_driver_sql(statement, execution_options={"no_parameters": True})
    except exc.DBAPIError as error:
        raise _translated(error, operation) from error


_REFUSED: Mapping[str, type[OutboxError]] = {
    "OB001": UnknownTypeError,
    "OB006": ConfigError,
    "OB020": CaptureError,
    "OB021": CaptureError,
}


def _translated(error: exc.DBAPIError, operation: _Statements) -> Exception:
    code = getattr(error.orig, "sqlstate", None)
    diag = getattr(error.orig, "diag", None)
    if code is None or diag is None:
        return error
    said = str(diag.message_primary)
    if code.startswith("OB"):
        return (operation.refused or _REFUSED.get(code, OutboxError))(said, cure=str(diag.message_hint or ""))
    if code == "25P01":
        return CaptureError(
            f"A table can only be captured inside a transaction: {said}.",
            cure="Run the migration without AUTOCOMMIT and outside of autocommit_block(): a failure would leave the "
            "table half captured.",
        )
    if code == "42501":
        return DatabaseError(
            f"PostgreSQL denied it to the role that migrates: {said}.",
            cure=f'Migrate as the owner of the schema "{operation.schema}" and of the captured tables. Where the role '
            f"may not create the schema, let the database's owner: CREATE SCHEMA {quote(operation.schema)} "
            "AUTHORIZATION ROLE.",
        )
    if code in {"3F000", "42P01"} and quote(operation.schema).strip('"') in said:
        return SchemaError(
            f'There is no outbox in the schema "{operation.schema}" of this database: {said}.',
            cure="Create it in an earlier revision: op.outbox_create(...), or name its schema: schema=NAME.",
        )
    return error


def _operation(name: str) -> Callable[[type[Any]], type[Any]]:
    return Operations.register_operation(name, "invoke")


@_operation("outbox_create")
class OutboxCreate:
    """`op.outbox_create`."""

    @classmethod
    def invoke(
        cls,
        operations: Operations,
        *,
        name: str | None = None,
        version: int = NEWEST,
        schema: str = "outbox",
        shards: int = 1,
        retention: str = "7 days",
        slots: int = 12,
        doorbell: bool = True,
        writers: Sequence[str] = (),
        relay: str | None = None,
    ) -> None:
        """Create the outbox at a version; `outbox.schema.Settings` says what is fixed with it.

        `name` defaults to the database's. `writers` and `relay` are roles that get what they need.
        """
        settings = Settings(name, schema, shards, retention, slots, doorbell)
        made = [create_schema(schema)]
        for number in range(1, version + 1):
            made += statements_up(number, settings)
        made += grants(schema, writers=writers, relay=relay)
        operations.invoke(_Statements(made, schema=schema))


@_operation("outbox_drop")
class OutboxDrop:
    """`op.outbox_drop`."""

    @classmethod
    def invoke(cls, operations: Operations, *, version: int = NEWEST, schema: str = "outbox") -> None:
        """Remove the outbox with every entry and entity type; said on standard output, with numbers. Topics stay."""
        settings = Settings(None, schema)

        def look(bind: Any) -> None:
            entries = bind.exec_driver_sql(f"SELECT count(*) FROM {quote(schema)}.entries").scalar()
            types = bind.exec_driver_sql(f"SELECT count(*) FROM {quote(schema)}.entity_types").scalar()
            msg(
                f"Removing the outbox {schema}: {entries} entries and {types} entity types are deleted; what was not "
                "published is lost, topics stay."
            )

        gone = [_capture.refuse_captured(schema)]
        for number in range(version, 0, -1):
            gone += statements_down(number, settings)
        operations.invoke(_Statements([*gone, drop_schema(schema)], look, schema=schema))


@_operation("outbox_upgrade")
class OutboxUpgrade:
    """`op.outbox_upgrade`."""

    @classmethod
    def invoke(cls, operations: Operations, *, from_version: int, to_version: int, schema: str = "outbox") -> None:
        """Bring the outbox from one version of its schema to a newer one."""
        if not 1 <= from_version < to_version <= NEWEST:
            raise ConfigError(
                f"The outbox cannot be upgraded from version {from_version} to {to_version}.",
                cure=f"This library knows the versions 1 to {NEWEST}; a newer one may know more.",
            )
        settings = Settings(None, schema)
        for number in range(from_version + 1, to_version + 1):
            operations.invoke(_Statements(statements_up(number, settings), schema=schema))


@_operation("outbox_downgrade")
class OutboxDowngrade:
    """`op.outbox_downgrade`."""

    @classmethod
    def invoke(cls, operations: Operations, *, from_version: int, to_version: int, schema: str = "outbox") -> None:
        """Take the outbox back to an older version of its schema."""
        if not 1 <= to_version < from_version <= NEWEST:
            raise ConfigError(
                f"The outbox cannot be taken back from version {from_version} to {to_version}.",
                cure=f"This library knows the versions 1 to {NEWEST}.",
            )
        settings = Settings(None, schema)
        for number in range(from_version, to_version, -1):
            operations.invoke(_Statements(statements_down(number, settings), schema=schema))


@_operation("outbox_grant")
class OutboxGrant:
    """`op.outbox_grant`."""

    @classmethod
    def invoke(
        cls, operations: Operations, *, writers: Sequence[str] = (), relay: str | None = None, schema: str = "outbox"
    ) -> None:
        """Let roles write entries, and one role publish them."""
        operations.invoke(_Statements(grants(schema, writers=writers, relay=relay), schema=schema))


@_operation("outbox_add_type")
class OutboxAddType:
    """`op.outbox_add_type`."""

    @classmethod
    def invoke(
        cls,
        operations: Operations,
        name: str,
        *,
        topic: str,
        partitions: int | None = None,
        topic_settings: Mapping[str, object] | None = None,
        collapse: bool = True,
        max_bytes: int = 1_000_000,
        source: str | None = None,
        comparison: str | None = None,
        schema: str = "outbox",
    ) -> None:
        """Register an entity type; `outbox.entity_type.EntityType` says what the values mean."""
        settings = dict(topic_settings or {}) | ({} if partitions is None else {"partitions": partitions})
        check_settings(settings, where=f'The entity type "{name}"')
        check_type(name, topic=topic, max_bytes=max_bytes)
        check_comparison(comparison)
        body = f"""
BEGIN
    IF EXISTS (SELECT FROM {quote(schema)}.entity_types WHERE name = {literal(name)}) THEN
        RAISE EXCEPTION 'outbox: the entity type "%" is there already', {literal(name)} USING ERRCODE = 'OB006',
            HINT = 'Leave this out, or change the type: op.outbox_change_type(...).';
    END IF;
{_topic_is_free(schema, name, topic)}
    INSERT INTO {quote(schema)}.entity_types (name, topic, topic_settings, collapse, max_bytes, source, comparison)
    VALUES ({literal(name)}, {literal(topic)}, {_json(settings)}, {_bool(collapse)}, {max_bytes},
            {"NULL" if source is None else literal(source)}, {"NULL" if comparison is None else literal(comparison)});
END
"""
        operations.invoke(_Statements([do(body)], schema=schema))


@_operation("outbox_change_type")
class OutboxChangeType:
    """`op.outbox_change_type`."""

    @classmethod
    def invoke(
        cls,
        operations: Operations,
        name: str,
        *,
        topic: str | None = None,
        topic_settings: Mapping[str, object] | None = None,
        collapse: bool | None = None,
        max_bytes: int | None = None,
        source: str | None = None,
        comparison: str | None = None,
        schema: str = "outbox",
    ) -> None:
        """Change an entity type; what is None stays. `topic_settings` replaces all of them."""
        check_settings(topic_settings or {}, where=f'The entity type "{name}"')
        check_type(name, topic=topic, max_bytes=max_bytes)
        check_comparison(comparison)
        changes = [
            f"{column} = {text}"
            for column, value, text in (
                ("topic", topic, literal(topic or "")),
                ("topic_settings", topic_settings, _json(topic_settings or {})),
                ("collapse", collapse, _bool(bool(collapse))),
                ("max_bytes", max_bytes, str(max_bytes)),
                ("source", source, literal(source or "")),
                ("comparison", comparison, literal(comparison or "")),
            )
            if value is not None
        ]
        if not changes:
            raise ConfigError(f'Nothing of the entity type "{name}" is to be changed.', cure="Name a value.")
        body = f"""
BEGIN
{"" if topic is None else _topic_is_free(schema, name, topic)}
    UPDATE {quote(schema)}.entity_types SET {", ".join(changes)} WHERE name = {literal(name)};
{_or_unknown(name)}
END
"""
        operations.invoke(_Statements([do(body)], schema=schema))


@_operation("outbox_remove_type")
class OutboxRemoveType:
    """`op.outbox_remove_type`."""

    @classmethod
    def invoke(cls, operations: Operations, name: str, *, schema: str = "outbox") -> None:
        """Remove an entity type; its topic stays, and so do its entries (unpublished ones are dead-lettered)."""
        body = f"""
BEGIN
    IF EXISTS (SELECT FROM {quote(schema)}.entity_types WHERE follows = {literal(name)}) THEN
        RAISE EXCEPTION 'outbox: another topic follows the entity type "%"', {literal(name)} USING ERRCODE = 'OB006',
            HINT = 'End that first: outbox topics retire TOPIC; see outbox types list.';
    END IF;
    DELETE FROM {quote(schema)}.entity_types WHERE name = {literal(name)};
{_or_unknown(name)}
END
"""
        operations.invoke(_Statements([_capture.refuse_captured(schema, type=name), do(body)], schema=schema))


@_operation("outbox_capture")
class OutboxCapture:
    """`op.outbox_capture`."""

    @classmethod
    def invoke(
        cls,
        operations: Operations,
        table: str,
        *,
        type: str,
        key: str | Sequence[str] = ("id",),
        columns: Sequence[str] | None = None,
        state: str | None = None,
        existing_rows: bool = True,
        truncate: Literal["refuse", "tombstones"] = "refuse",
        table_schema: str = "public",
        schema: str = "outbox",
    ) -> None:
        """Publish every change of a table by a trigger; `outbox.capture.Capture` says what the values mean.

        `existing_rows` writes an entry for each row that is there, in the same transaction: the table is locked
        against writers until the migration commits. The migration must run in READ COMMITTED then.
        """
        captured = _capture.Capture(table, type, key, columns, state, truncate, table_schema, schema)
        made = _capture.statements(captured, existing_rows=existing_rows)
        operations.invoke(_Statements(made, schema=schema, refused=CaptureError))


@_operation("outbox_release")
class OutboxRelease:
    """`op.outbox_release`."""

    @classmethod
    def invoke(
        cls, operations: Operations, table: str, *, table_schema: str = "public", schema: str = "outbox"
    ) -> None:
        """End a capture; entries, topic and entity type stay.

        A table that is gone, or has another name now, is released by the name under which it was captured.
        """
        gone = _capture.release_statements(table, table_schema=table_schema, schema=schema)
        operations.invoke(_Statements(gone, schema=schema))


def check_type(name: str, *, topic: str | None = None, max_bytes: int | None = None) -> None:
    """Refuse what the table's constraints would, in words; None is not looked at."""
    if not name or len(name.encode()) > 200:
        raise ConfigError(f'"{name[:200]}" cannot be the name of an entity type.', cure="Use 1 to 200 bytes.")
    if topic is not None and (not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", topic) or topic in {".", ".."}):
        raise ConfigError(
            f'"{topic[:260]}" cannot be the topic of the entity type "{name}".',
            cure="A topic's name has letters, digits, dot, underscore and hyphen, at most 249.",
        )
    if max_bytes is not None and not 1 <= max_bytes <= 100_000_000:
        raise ConfigError(
            f'The states of the entity type "{name}" cannot have {max_bytes} bytes at most.',
            cure="Use 1 to 100000000; the default is 1000000.",
        )


def _topic_is_free(schema: str, name: str, topic: str) -> str:
    return f"""    IF EXISTS (SELECT FROM {quote(schema)}.entity_types t WHERE t.topic = {literal(topic)}
               AND t.name <> {literal(name)}) THEN
        RAISE EXCEPTION 'outbox: the topic % carries another entity type, so it cannot carry "%"', {literal(topic)},
            {literal(name)} USING ERRCODE = 'OB006', HINT = 'The topic says the type: choose another one.';
    END IF;"""


def _or_unknown(name: str) -> str:
    return f"""    IF NOT FOUND THEN
        RAISE EXCEPTION 'outbox: there is no entity type "%"', {literal(name)} USING ERRCODE = 'OB001',
            HINT = 'See them: outbox types list.';
    END IF;"""


def check_name(found: str, asked: str | None) -> None:
    """Refuse an outbox of another name than was asked for."""
    if asked is not None and found != asked:
        raise WrongOutboxError(
            f'The outbox is named "{found}", not "{asked}"; a name is fixed when the outbox is created.',
            cure="Correct --name (or OUTBOX_NAME), or the database URL.",
        )


_PLAIN = {"no_parameters": True}
# The tables of every outbox of the database. An outbox is known by what no other schema has: a table may be called
# entries, or captures, anywhere.
_OURS = """
SELECT n.nspname, c.relname, pg_table_is_visible(c.oid), has_table_privilege(c.oid, 'SELECT')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p')
  AND EXISTS (SELECT FROM pg_proc p WHERE p.pronamespace = n.oid AND p.proname = 'shard_of'
              AND oidvectortypes(p.proargtypes) = 'text, text')
  AND EXISTS (SELECT FROM pg_class e JOIN pg_attribute a ON a.attrelid = e.oid AND a.attname = 'xid'
              WHERE e.relnamespace = n.oid AND e.relname = 'entries' AND a.atttypid = 'xid8'::regtype)
  AND (c.relname ~ '^entries(_[0-9]+)?$' OR c.relname IN ('settings', 'entity_types', 'captures', 'requests',
                                                          'request_outcomes', 'sealed', 'alembic_version'))
"""


# Last of all: by then the others have said what they want to drop.
@comparators.dispatch_for("schema", priority=DispatchPriority.LAST)
def _keep_ours(context: AutogenContext, upgrade: UpgradeOps, schemas: Iterable[str | None]) -> None:
    """Take our own tables out of what autogenerate wants to drop, whatever schema it looked at."""
    del schemas  # ours are known by what is in the database
    connection = context.connection
    if connection is None or connection.dialect.name != "postgresql":
        return  # the database of another part of the service: of a read model in SQLite, for example
    ours: set[tuple[str | None, str]] = set()
    for schema, table, visible, readable in connection.exec_driver_sql(_OURS, execution_options=_PLAIN):
        if table == "alembic_version" and readable:
            # Alembic's own name: ours only where `outbox migrate` wrote it.
            query = f"SELECT count(*) FROM {quote(schema)}.alembic_version WHERE version_num LIKE 'outbox\\_%'"
            if not connection.exec_driver_sql(query, execution_options=_PLAIN).scalar():
                continue
        ours.add((schema, table))
        if visible:
            # Wherever its schema stands in the search path: autogenerate sees it without one.
            ours.add((None, table))

    def dropped(operation: MigrateOperation) -> bool:
        if isinstance(operation, DropTableOp | DropIndexOp):
            return (operation.schema, operation.table_name) in ours
        if isinstance(operation, ModifyTableOps):
            operation.ops = [inner for inner in operation.ops if not dropped(inner)]
            return not operation.ops
        return False

    upgrade.ops = [operation for operation in upgrade.ops if not dropped(operation)]


def _json(value: Mapping[str, object]) -> str:
    return literal(orjson.dumps(dict(value)).decode()) + "::jsonb"


def _bool(value: bool) -> str:  # noqa: FBT001  one value in, one word out
    return "true" if value else "false"
