"""Capture: a trigger that writes the entries of a table, for services in any language.

The trigger fires after each row and **re-reads the row by its key**: with NEW, the outer of two nested triggers would
write its older row last. One statement for the old key and, where the key changed, one for the new: a row that is
there gives its state, one that is not a tombstone. Everything is static SQL in a function of the outbox's schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from outbox.errors import CaptureError
from outbox.schema import literal, quote


@dataclass(frozen=True, slots=True)
class Capture:
    """Which table is published, and how.

    `key` are the columns of an immediate unique constraint, in the key's order. `columns` are those of the state
    (None: all), written as a JSON object; an UPDATE that changes none of them writes no entry. `state` is an SQL
    expression of type json or jsonb over the row `t` instead; it sees only `pg_catalog`, so other names are written
    with their schema. `on_truncate`: `refuse`, or write `tombstones`.
    """

    table: str
    type: str
    key: Sequence[str] = ("id",)
    columns: Sequence[str] | None = None
    state: str | None = None
    on_truncate: str = "refuse"
    table_schema: str = "public"
    schema: str = "outbox"

    def __post_init__(self) -> None:
        if not self.key:
            raise CaptureError(
                f"The capture of {self.table} names no key.", cure="Give the columns of its primary key."
            )
        if self.columns is not None and self.state is not None:
            raise CaptureError(
                f"The capture of {self.table} names both columns and a state.", cure="Give one of the two."
            )
        if self.on_truncate not in {"refuse", "tombstones"}:
            raise CaptureError(
                f'The capture of {self.table} knows no truncate "{self.on_truncate}".', cure="Use refuse or tombstones."
            )

    @property
    def target(self) -> str:
        """The table, as SQL needs it."""
        return f"{quote(self.table_schema)}.{quote(self.table)}"

    @property
    def function(self) -> str:
        """The trigger function, as SQL needs it. Names longer than 63 bytes are cut by PostgreSQL, ours before."""
        plain = f"capture_{self.table_schema}_{self.table}"
        return f"{quote(self.schema)}.{quote(plain[:50])}"

    def key_of(self, row: str) -> str:
        """The expression of the key's text: the parts with colons between, escaped when there are several."""
        if len(self.key) == 1:
            return f"{row}.{quote(self.key[0])}::text"
        parts = (rf"replace(replace({row}.{quote(c)}::text, '\', '\\'), ':', '\:')" for c in self.key)
        return " || ':' || ".join(parts)

    @property
    def state_of(self) -> str:
        """The expression of the state's text, over the row `t`."""
        if self.state is not None:
            return f"({self.state})::jsonb::text"
        if self.columns is None:
            return "to_jsonb(t)::text"
        pairs = ", ".join(f"{literal(c)}, t.{quote(c)}" for c in self.columns)
        return f"jsonb_build_object({pairs})::text"

    @property
    def source(self) -> str:
        """The query of all keys and states, equal byte for byte to what the trigger writes."""
        return f"SELECT {self.key_of('t')} AS key, {self.state_of} AS state FROM {self.target} t"


def statements(capture: Capture, *, existing_rows: bool) -> Iterator[str]:
    """The statements that capture a table, in one transaction: the trigger's lock keeps writers out meanwhile."""
    s, t = quote(capture.schema), capture.target
    yield _check(capture)
    yield (
        f"INSERT INTO {s}.captures (table_schema, table_name, type, key_columns, state, on_truncate) VALUES "
        f"({literal(capture.table_schema)}, {literal(capture.table)}, {literal(capture.type)}, "
        f"ARRAY[{', '.join(literal(c) for c in capture.key)}], {literal(capture.state_of)}, "
        f"{literal(capture.on_truncate)})"
    )
    yield (
        f"UPDATE {s}.entity_types SET source = {literal(capture.source)} "
        f"WHERE name = {literal(capture.type)} AND source IS NULL"
    )
    yield _function(capture)
    call = f"EXECUTE FUNCTION {capture.function}()"
    yield f"CREATE TRIGGER outbox_capture AFTER INSERT OR UPDATE OR DELETE ON {t} FOR EACH ROW {call}"
    yield f"CREATE TRIGGER outbox_capture_truncate BEFORE TRUNCATE ON {t} FOR EACH STATEMENT {call}"
    # Also in a logical apply worker and under session_replication_role = replica: the rows change there too.
    yield f"ALTER TABLE {t} ENABLE ALWAYS TRIGGER outbox_capture"
    yield f"ALTER TABLE {t} ENABLE ALWAYS TRIGGER outbox_capture_truncate"
    if existing_rows:
        keys = ", ".join(f"t.{quote(c)}" for c in capture.key)
        yield (
            f"INSERT INTO {s}.entries (type, key, state) SELECT {literal(capture.type)}, {capture.key_of('t')}, "
            f"convert_to({capture.state_of}, 'UTF8') FROM {t} t ORDER BY {keys}"
        )


def release_statements(table: str, *, table_schema: str, schema: str) -> Iterator[str]:
    """The statements that end a capture; entries and topic stay."""
    capture = Capture(table, "", table_schema=table_schema, schema=schema)
    yield f"DROP TRIGGER outbox_capture ON {capture.target}"
    yield f"DROP TRIGGER outbox_capture_truncate ON {capture.target}"
    yield f"DROP FUNCTION {capture.function}()"
    where = f"table_schema = {literal(table_schema)} AND table_name = {literal(table)}"
    yield (
        f"UPDATE {quote(schema)}.entity_types SET source = NULL "
        f"WHERE name IN (SELECT type FROM {quote(schema)}.captures WHERE {where})"
    )
    yield f"DELETE FROM {quote(schema)}.captures WHERE {where}"


def _check(capture: Capture) -> str:
    """Refuse at once what would misorder: in SQL, so that it holds for a migration script too."""
    columns = f"ARRAY[{', '.join(literal(c) for c in capture.key)}]::text[]"
    listed = literal(", ".join(capture.key))
    alter = f"ALTER TABLE {capture.target} ADD UNIQUE ({', '.join(map(quote, capture.key))})"
    return f"""DO $outbox$
DECLARE
    target regclass := {literal(capture.target)};
    missing text;
BEGIN
    IF NOT EXISTS (SELECT FROM {quote(capture.schema)}.entity_types WHERE name = {literal(capture.type)}) THEN
        RAISE EXCEPTION 'outbox: cannot capture %: there is no entity type "%"', target, {literal(capture.type)}
            USING ERRCODE = 'OB020', HINT = 'Register it before: op.outbox_add_type(...).';
    END IF;
    IF (SELECT relkind <> 'r' OR relispartition FROM pg_class WHERE oid = target)
       OR EXISTS (SELECT FROM pg_inherits WHERE target IN (inhparent, inhrelid)) THEN
        RAISE EXCEPTION 'outbox: cannot capture %: it is partitioned, inherited or no table', target
            USING ERRCODE = 'OB020', HINT = 'Write its entries with outbox.put in your own trigger or code.';
    END IF;
    SELECT string_agg(k, ', ') INTO missing FROM unnest({columns}) k WHERE NOT EXISTS (
        SELECT FROM pg_attribute a WHERE a.attrelid = target AND a.attname = k AND a.attnotnull AND NOT a.attisdropped);
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION 'outbox: cannot capture %: its key column % is missing or may be null', target, missing
            USING ERRCODE = 'OB020', HINT = 'ALTER TABLE ... ALTER COLUMN ... SET NOT NULL.';
    END IF;
    -- With a deferrable constraint a delete in one transaction and an insert of the same key in another do not wait
    -- for each other, and the tombstone may come last.
    IF NOT EXISTS (
        SELECT FROM pg_index i WHERE i.indrelid = target AND i.indisunique AND i.indimmediate AND i.indisvalid
          AND i.indpred IS NULL AND i.indexprs IS NULL
          AND (SELECT array_agg(a.attname::text ORDER BY a.attname::text) FROM pg_attribute a
               WHERE a.attrelid = target AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1]))
              = (SELECT array_agg(k ORDER BY k) FROM unnest({columns}) k)) THEN
        RAISE EXCEPTION 'outbox: cannot capture %: it has no immediate unique constraint on exactly (%)',
            target, {listed}
            USING ERRCODE = 'OB020', HINT = {literal("Add one that is not deferrable: " + alter)};
    END IF;
END
$outbox$"""


def _function(capture: Capture) -> str:
    s, name = quote(capture.schema), literal(capture.type)
    if capture.on_truncate == "refuse":
        truncate = """RAISE EXCEPTION 'outbox: % is published: TRUNCATE would leave its topic as it is',
            TG_RELID::regclass USING ERRCODE = 'OB021',
            HINT = 'DELETE the rows, or capture the table with truncate="tombstones".';"""
    else:
        truncate = f"""INSERT INTO {s}.entries (type, key, state)
            SELECT {name}, {capture.key_of("t")}, NULL FROM {capture.target} t;
        RETURN NULL;"""
    unchanged = ""
    if capture.columns is not None:
        watched = list(dict.fromkeys([*capture.key, *capture.columns]))
        new, old = (", ".join(f"{row}.{quote(c)}" for c in watched) for row in ("NEW", "OLD"))
        # The binary comparison: it works for every type.
        unchanged = f"""
    IF TG_OP = 'UPDATE' AND NOT (ROW({new})::record *<> ROW({old})::record) THEN
        RETURN NULL;
    END IF;"""
    changed = " OR ".join(f"NEW.{quote(c)} IS DISTINCT FROM OLD.{quote(c)}" for c in capture.key)
    return f"""CREATE FUNCTION {capture.function}() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $outbox$
DECLARE
    entity text;
    body   bytea;
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        {truncate}
    END IF;{unchanged}
    IF TG_OP <> 'INSERT' THEN
{_write(capture, "OLD")}
    END IF;
    IF TG_OP = 'INSERT' THEN
{_write(capture, "NEW")}
    ELSIF TG_OP = 'UPDATE' AND ({changed}) THEN
{_write(capture, "NEW")}
    END IF;
    RETURN NULL;
END
$outbox$"""


def _write(capture: Capture, row: str) -> str:
    where = " AND ".join(f"t.{quote(c)} = {row}.{quote(c)}" for c in capture.key)
    s, name = quote(capture.schema), literal(capture.type)
    return f"""        entity := {capture.key_of(row)};
        body := (SELECT convert_to({capture.state_of}, 'UTF8') FROM {capture.target} t WHERE {where});
        PERFORM {s}.check_entry({name}, entity, coalesce(octet_length(body), 0), NULL);
        INSERT INTO {s}.entries (type, key, state) VALUES ({name}, entity, body);"""
