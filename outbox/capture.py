"""Capture: a trigger that writes the entries of a table, for services in any language.

The trigger fires after each row and **re-reads the row by its key**: with NEW, the outer of two nested triggers would
write its older row last. One statement for the old key and, where the key changed, one for the new: a row that is
there gives its state, one that is not a tombstone. Everything is static SQL in a function of the outbox's schema.

A key, and a state, must have one text, whoever writes the row: consumers know an entity by its key's text, and the
state that the trigger wrote is compared with what the source query gives. Hence the few types of keys that are
allowed, and the settings that the function pins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import orjson

from outbox.errors import CaptureError
from outbox.schema import do, dollars, literal, quote

TEXT_SETTINGS: Mapping[str, str] = {
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "lc_monetary": "C",
    "lc_numeric": "C",
    "lc_time": "C",
    # A policy would hide rows, and a hidden row looks like a deleted one: off makes PostgreSQL raise instead.
    "row_security": "off",
}
"""Settings under which the trigger, the existing rows and `Capture.source` give the same bytes.

A session that runs a source query sets all of these; they change nothing else in it.
"""

SEARCH_PATH = "pg_catalog, pg_temp"
"""The search path of the trigger. A source that `Capture` derived is run with it, too (`SET LOCAL`): an expression
may mean another operator otherwise, and a `regclass` is written with its schema."""


@dataclass(frozen=True, slots=True)
class Capture:
    """Which table is published, and how.

    `key` are the columns of an immediate unique constraint, in the key's order (one may be given as a plain text).
    `columns` are those of the state (None: all), written as a JSON object; an UPDATE that changes none of them
    writes no entry. `state` is an SQL expression of type json or jsonb over the row `t` instead; it sees only
    `pg_catalog`, so other names are written with their schema. Where it is null the row is not published: a
    tombstone is written. `on_truncate`: `refuse`, or write `tombstones`. Raises `CaptureError`.
    """

    table: str
    type: str
    key: str | Sequence[str] = ("id",)
    columns: Sequence[str] | None = None
    state: str | None = None
    on_truncate: str = "refuse"
    table_schema: str = "public"
    schema: str = "outbox"

    def __post_init__(self) -> None:
        for name in ("key", "columns"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        if not self.key:
            raise CaptureError(
                f"The capture of {self.table} names no key.", cure="Give the columns of its primary key."
            )
        if self.columns is not None and not self.columns:
            raise CaptureError(
                f"The capture of {self.table} names no columns.", cure="Name some, or leave columns out: all of them."
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
    def shown(self) -> str:
        """The table, as messages name it."""
        return f"{self.table_schema}.{self.table}"

    @property
    def function_name(self) -> str:
        """The name of the trigger function: readable, at most 63 bytes, and another one for each table.

        `a.b_c` and `a_b.c` read alike, and PostgreSQL cuts long names: the digits tell them apart.
        """
        digits = hashlib.blake2b(f"{self.table_schema}\0{self.table}".encode(), digest_size=4).hexdigest()
        readable = f"capture_{self.table_schema}_{self.table}".encode()[: 63 - 1 - len(digits)]
        return f"{readable.decode(errors='ignore')}_{digits}"

    @property
    def function(self) -> str:
        """The trigger function, as SQL needs it."""
        return f"{quote(self.schema)}.{quote(self.function_name)}"

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
            # On a line of its own: the expression may end in a comment.
            return f"({self.state}\n)::jsonb::text"
        if self.columns is None:
            # A plain `t` would be the column t, where there is one.
            return "to_jsonb(t.*)::text"
        pairs = [f"{literal(c)}, t.{quote(c)}" for c in self.columns]
        # A function takes 100 arguments at most.
        objects = (f"jsonb_build_object({', '.join(pairs[n : n + 50])})" for n in range(0, len(pairs), 50))
        return f"({' || '.join(objects)})::text"

    @property
    def source(self) -> str:
        """The query of all keys and states, with the columns of the key as `key_1`, `key_2` ..., by which it is paged.

        Under `TEXT_SETTINGS` and `SEARCH_PATH` its texts are, byte for byte, what the trigger writes. Rows that are
        not published (their state is null) are left out.
        """
        made_of = ", ".join(f"t.{quote(column)} AS key_{n}" for n, column in enumerate(self.key, start=1))
        query = f"SELECT {self.key_of('t')} AS key, {self.state_of} AS state, {made_of} FROM ONLY {self.target} t"
        return query if self.state is None else f"{query} WHERE {self.state_of} IS NOT NULL"


def statements(capture: Capture, *, existing_rows: bool) -> Iterator[str]:
    """The statements that capture a table, in one transaction: the trigger's lock keeps writers out meanwhile."""
    s, t = quote(capture.schema), capture.target
    yield _check_names(capture)
    # The lock that CREATE TRIGGER takes, before the table is looked at. It also refuses autocommit, in which a failure
    # would leave a half captured table.
    yield f"LOCK TABLE {t} IN SHARE ROW EXCLUSIVE MODE"
    yield _check(capture, existing_rows=existing_rows)
    yield (
        f"INSERT INTO {s}.captures (table_schema, table_name, type, key_columns, state, on_truncate, function_name, "
        f"source) VALUES ({literal(capture.table_schema)}, {literal(capture.table)}, {literal(capture.type)}, "
        f"ARRAY[{', '.join(literal(c) for c in capture.key)}], {literal(capture.state_of)}, "
        f"{literal(capture.on_truncate)}, {literal(capture.function_name)}, {literal(capture.source)})"
    )
    yield (
        f"UPDATE {s}.entity_types SET source = {literal(capture.source)} "
        f"WHERE name = {literal(capture.type)} AND source IS NULL"
    )
    yield _function(capture)
    # It runs as its owner: whoever could make a trigger with it could write entries of this type.
    yield f"REVOKE ALL ON FUNCTION {capture.function}() FROM PUBLIC"
    call = f"EXECUTE FUNCTION {capture.function}()"
    yield f"CREATE TRIGGER outbox_capture AFTER INSERT OR UPDATE OR DELETE ON {t} FOR EACH ROW {call}"
    yield f"CREATE TRIGGER outbox_capture_truncate BEFORE TRUNCATE ON {t} FOR EACH STATEMENT {call}"
    # Also in a logical apply worker and under session_replication_role = replica: the rows change there too.
    yield f"ALTER TABLE {t} ENABLE ALWAYS TRIGGER outbox_capture"
    yield f"ALTER TABLE {t} ENABLE ALWAYS TRIGGER outbox_capture_truncate"
    if existing_rows:
        yield _existing_rows(capture)


def release_statements(table: str, *, table_schema: str, schema: str) -> Iterator[str]:
    """The statements that end a capture; entries and topic stay. The table may be gone, or have another name now."""
    capture = Capture(table, "", table_schema=table_schema, schema=schema)
    s, shown = quote(schema), literal(capture.shown)
    body = f"""
DECLARE
    gone   {s}.captures%ROWTYPE;
    former {s}.captures%ROWTYPE;
BEGIN
    DELETE FROM {s}.captures c WHERE c.table_schema = {literal(table_schema)} AND c.table_name = {literal(table)}
        RETURNING * INTO gone;
    IF gone.type IS NULL THEN
        SELECT c.* INTO former FROM {s}.captures c
            JOIN pg_catalog.pg_proc p ON p.proname = c.function_name AND p.pronamespace = {literal(s)}::regnamespace
            JOIN pg_catalog.pg_trigger g ON g.tgfoid = p.oid
            WHERE g.tgrelid = to_regclass({literal(capture.target)}) LIMIT 1;
        IF former.type IS NOT NULL THEN
            RAISE EXCEPTION 'outbox: % was captured under another name, %.%', {shown},
                former.table_schema, former.table_name USING ERRCODE = 'OB020',
                HINT = format('Release that one: op.outbox_release(%L, table_schema=%L).',
                              former.table_name, former.table_schema);
        END IF;
        RAISE EXCEPTION 'outbox: % is not captured', {shown} USING ERRCODE = 'OB020',
            HINT = {literal(f"Those that are: SELECT table_schema, table_name FROM {s}.captures.")};
    END IF;
    -- What a person wrote stays.
    UPDATE {s}.entity_types e SET source = NULL
    WHERE e.name = gone.type AND e.source = gone.source AND NOT e.reads_source;
    -- The triggers go with it, whatever their table is called now; a table that is gone took them along.
    EXECUTE format('DROP FUNCTION IF EXISTS {s.replace("%", "%%")}.%I() CASCADE', gone.function_name);
END
"""
    yield do(body)


def refuse_captured(schema: str, *, type: str | None = None) -> str:
    """The statement that refuses to remove what a capture needs: the outbox, or (`type`) one entity type."""
    s = quote(schema)
    where, what = ("true", "the outbox") if type is None else (f"c.type = {literal(type)}", f'the entity type "{type}"')
    body = f"""
DECLARE
    captured text := (SELECT string_agg(format('%s.%s', c.table_schema, c.table_name), ', ')
                      FROM {s}.captures c WHERE {where});
BEGIN
    IF captured IS NOT NULL THEN
        RAISE EXCEPTION 'outbox: % cannot be removed while it publishes a table: %', {literal(what)}, captured
            USING ERRCODE = 'OB020', HINT = 'Release it before: op.outbox_release(TABLE, table_schema=SCHEMA).';
    END IF;
END
"""
    return do(body)


def _check_names(capture: Capture) -> str:
    """Refuse what cannot even be locked, and a table or type that is captured already."""
    s, shown, name = quote(capture.schema), literal(capture.shown), literal(capture.type)
    body = f"""
DECLARE
    target regclass := to_regclass({literal(capture.target)});
    other  text;
BEGIN
    IF target IS NULL THEN
        RAISE EXCEPTION 'outbox: cannot capture %: there is no such table', {shown} USING ERRCODE = 'OB020',
            HINT = 'Create it before, and give its schema where that is not public: table_schema=SCHEMA.';
    END IF;
    IF (SELECT relkind <> 'r' OR relispartition FROM pg_class WHERE oid = target)
       OR EXISTS (SELECT FROM pg_inherits WHERE target IN (inhparent, inhrelid)) THEN
        RAISE EXCEPTION 'outbox: cannot capture %: it is partitioned, inherited or no table', {shown}
            USING ERRCODE = 'OB020', HINT = 'Write its entries with outbox.put in your own trigger or code.';
    END IF;
    IF (SELECT relpersistence <> 'p' FROM pg_class WHERE oid = target) THEN
        RAISE EXCEPTION 'outbox: cannot capture %: it is temporary or unlogged, so a crash empties it unnoticed',
            {shown} USING ERRCODE = 'OB020', HINT = 'ALTER TABLE ... SET LOGGED.';
    END IF;
    IF NOT EXISTS (SELECT FROM {s}.entity_types WHERE name = {name}) THEN
        RAISE EXCEPTION 'outbox: cannot capture %: there is no entity type "%"', {shown}, {name}
            USING ERRCODE = 'OB020', HINT = 'Register it before: op.outbox_add_type(...).';
    END IF;
    IF EXISTS (SELECT FROM {s}.captures c WHERE c.table_schema = {literal(capture.table_schema)}
               AND c.table_name = {literal(capture.table)}) THEN
        RAISE EXCEPTION 'outbox: cannot capture %: it is captured already', {shown} USING ERRCODE = 'OB020',
            HINT = 'To capture it otherwise, or a new table of this name, call op.outbox_release(...) before.';
    END IF;
    SELECT format('%s.%s', c.table_schema, c.table_name) INTO other FROM {s}.captures c WHERE c.type = {name};
    IF other IS NOT NULL THEN
        RAISE EXCEPTION 'outbox: cannot capture %: the entity type "%" has the rows of %', {shown}, {name}, other
            USING ERRCODE = 'OB020', HINT = 'Give it a type of its own: rows of one key would overwrite each other.';
    END IF;
    IF EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = target
               AND g.tgname IN ('outbox_capture', 'outbox_capture_truncate')) THEN
        RAISE EXCEPTION 'outbox: cannot capture %: it has a trigger outbox_capture', {shown} USING ERRCODE = 'OB020',
            HINT = 'It was captured under another name, or by another outbox: call op.outbox_release(...) for that.';
    END IF;
END
"""
    return do(body)


def _check(capture: Capture, *, existing_rows: bool) -> str:
    """Refuse at once what would misorder, or break every write: in SQL, so that it holds for a script too."""
    shown = literal(capture.shown)
    columns = f"ARRAY[{', '.join(literal(c) for c in capture.key)}]::text[]"
    listed = literal(", ".join(capture.key))
    alter = f"ALTER TABLE {capture.target} ADD UNIQUE ({', '.join(map(quote, capture.key))})"
    isolation = """
    -- The rows must be read after the lock was taken.
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'outbox: the existing rows of % must be written in READ COMMITTED, not in %', {shown},
            current_setting('transaction_isolation') USING ERRCODE = 'OB020',
            HINT = 'Run the migration in READ COMMITTED, or capture with existing_rows=False.';
    END IF;""".replace("{shown}", shown)
    # No LIMIT without the join: it has one row, whose null still has the expression's type. A set or an aggregate is
    # not allowed in WHERE.
    state = capture.state_of if capture.state is None else f"({capture.state}\n)"
    attempt = literal(
        f"SELECT pg_typeof(tried.state) FROM (SELECT) one LEFT JOIN (SELECT {state} AS state, "
        f"convert_to({capture.state_of}, 'UTF8') AS bytes, {capture.key_of('t')} AS key "
        f"FROM ONLY {capture.target} t WHERE {capture.state_of} IS NOT NULL LIMIT 0) tried ON true"
    )
    return _pinned(
        f"""
    target  regclass := to_regclass({literal(capture.target)});
    wrong   text;
    kind    regtype;""",
        f"""{isolation if existing_rows else ""}
    SELECT string_agg(k, ', ') INTO wrong FROM unnest({columns}) k WHERE NOT EXISTS (
        SELECT FROM pg_attribute a WHERE a.attrelid = target AND a.attname = k AND a.attnotnull AND NOT a.attisdropped);
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'outbox: cannot capture %: its key column % is missing or may be null', {shown}, wrong
            USING ERRCODE = 'OB020',
            HINT = 'Name the columns of its primary key: key=(...); or ALTER TABLE ... ALTER COLUMN ... SET NOT NULL.';
    END IF;
    -- Equal values must have equal texts: 1.0 and 1.00, 'a' and 'A' without case, a float's two zeros have not.
    WITH RECURSIVE part AS (
        SELECT a.attname, a.attcollation, a.atttypid, a.atttypid AS base, a.atttypmod FROM pg_attribute a
        WHERE a.attrelid = target AND a.attname = ANY ({columns})
        UNION ALL
        SELECT p.attname, p.attcollation, p.atttypid, d.typbasetype, p.atttypmod
        FROM part p JOIN pg_type d ON d.oid = p.base WHERE d.typtype = 'd'
    )
    SELECT string_agg(format('%s (%s)', p.attname, format_type(p.atttypid, p.atttypmod)), ', ') INTO wrong
    FROM part p JOIN pg_type b ON b.oid = p.base LEFT JOIN pg_collation l ON l.oid = p.attcollation
    WHERE b.typtype <> 'd' AND (NOT coalesce(l.collisdeterministic, true) OR b.typtype <> 'e' AND b.oid <> ALL (
        '{{int2,int4,int8,text,varchar,bpchar,uuid,bool,date}}'::regtype[]));
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'outbox: cannot capture %: equal values of its key column % may have different texts', {shown},
            wrong USING ERRCODE = 'OB020',
            HINT = 'Use another unique column as the key: a whole number, text with a deterministic collation, uuid, '
                   'boolean, date, an enum, or a domain over one of these.';
    END IF;
    -- With a deferrable constraint a delete in one transaction and an insert of the same key in another do not wait
    -- for each other, and the tombstone may come last.
    IF NOT EXISTS (
        SELECT FROM pg_index i WHERE i.indrelid = target AND i.indisunique AND i.indimmediate AND i.indisvalid
          AND NOT i.indisexclusion AND i.indpred IS NULL AND i.indexprs IS NULL
          AND (SELECT array_agg(a.attname::text ORDER BY a.attname::text) FROM pg_attribute a
               WHERE a.attrelid = target AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1]))
              = (SELECT array_agg(k ORDER BY k) FROM unnest({columns}) k)) THEN
        RAISE EXCEPTION 'outbox: cannot capture %: it has no immediate unique constraint on exactly (%)',
            {shown}, {listed}
            USING ERRCODE = 'OB020', HINT = {literal("Add one that is not deferrable: " + alter)};
    END IF;
    -- The function runs as this role. A row that a policy hides from it would look like a deleted one.
    IF NOT EXISTS (SELECT FROM pg_roles r WHERE r.rolname = current_user AND (r.rolsuper OR r.rolbypassrls))
       AND (row_security_active(target) OR (SELECT c.relforcerowsecurity FROM pg_class c WHERE c.oid = target)) THEN
        RAISE EXCEPTION 'outbox: cannot capture %: its row security holds for %, who would own the trigger', {shown},
            current_user USING ERRCODE = 'OB020',
            HINT = 'Run the migration as a role with BYPASSRLS, or as the owner of a table without FORCE ROW LEVEL '
                   'SECURITY.';
    END IF;
    BEGIN
        EXECUTE {attempt} INTO kind;
    EXCEPTION WHEN OTHERS THEN
        RAISE EXCEPTION 'outbox: cannot capture %: its state cannot be made: %', {shown}, SQLERRM
            USING ERRCODE = 'OB020', HINT = 'Correct columns=[...] or state="...": an expression over the row t that '
                'is no set and no aggregate and names what is not in pg_catalog with its schema.';
    END;
    IF {"false" if capture.state is None else "true"} AND NOT EXISTS (
        SELECT FROM pg_type y WHERE y.oid = kind AND coalesce(nullif(y.typbasetype, 0), y.oid) IN (
            'json'::regtype, 'jsonb'::regtype)) THEN
        RAISE EXCEPTION 'outbox: cannot capture %: its state is of type %, not json or jsonb', {shown}, kind
            USING ERRCODE = 'OB020', HINT = 'For example: state="jsonb_build_object(''name'', t.name)".';
    END IF;""",
    )


def _existing_rows(capture: Capture) -> str:
    s, name = quote(capture.schema), literal(capture.type)
    held = "'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'"
    return _pinned(
        f"""
    most integer := (SELECT e.max_bytes FROM {s}.entity_types e WHERE e.name = {name});""",
        f"""
    IF NOT EXISTS (SELECT FROM pg_locks k WHERE k.pid = pg_backend_pid() AND k.granted AND k.mode IN ({held})
                   AND k.relation = to_regclass({literal(capture.target)})
                   AND k.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())) THEN
        RAISE EXCEPTION 'outbox: the existing rows of % must be written in the transaction that captures it',
            {literal(capture.shown)} USING ERRCODE = 'OB020', HINT = 'Run the whole migration in one transaction.';
    END IF;
    -- OFFSET 0: the state is made once a row. check_entry says what is wrong with which row.
    INSERT INTO {s}.entries (type, key, state)
        SELECT {name}, x.key, x.state FROM (
            SELECT {capture.key_of("t")} AS key, convert_to({capture.state_of}, 'UTF8') AS state
            FROM ONLY {capture.target} t ORDER BY {", ".join(f"t.{quote(c)}" for c in capture.key)} OFFSET 0) x
        WHERE CASE WHEN octet_length(x.key) BETWEEN 1 AND 1024 AND coalesce(octet_length(x.state), 0) <= most THEN true
                   ELSE {s}.check_entry({name}, x.key, coalesce(octet_length(x.state), 0), NULL) IS NOT NULL END;""",
    )


def _function(capture: Capture) -> str:
    s, name, shown = quote(capture.schema), literal(capture.type), literal(capture.shown)
    if capture.on_truncate == "refuse":
        truncate = f"""RAISE EXCEPTION 'outbox: % is published: TRUNCATE would leave its topic as it is', {shown}
            USING ERRCODE = 'OB021',
            HINT = 'DELETE the rows, or capture the table with truncate="tombstones".';"""
    else:
        truncate = f"""-- An older snapshot lacks rows that were committed before the table was locked.
        IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
            RAISE EXCEPTION 'outbox: % is published: in % TRUNCATE may miss rows', {shown},
                upper(current_setting('transaction_isolation'))
                USING ERRCODE = 'OB021', HINT = 'Run it in READ COMMITTED, or DELETE the rows.';
        END IF;
        PERFORM {s}.check_entry({name}, {capture.key_of("t")}, 0, NULL) FROM ONLY {capture.target} t;
        INSERT INTO {s}.entries (type, key, state)
            SELECT {name}, {capture.key_of("t")}, NULL FROM ONLY {capture.target} t;
        RETURN NULL;"""
    unchanged = ""
    if capture.columns is not None:
        watched = list(dict.fromkeys([*capture.key, *capture.columns]))
        new, old = (", ".join(f"{row}.{quote(c)}" for c in watched) for row in ("NEW", "OLD"))
        listed = ", ".join(literal(c) for c in watched)
        # The binary comparison: it works for every type.
        unchanged = f"""
    IF TG_OP = 'UPDATE' AND NOT (ROW({new})::record *<> ROW({old})::record) THEN
        -- A virtual column is computed when it is read: neither row holds it.
        IF NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = TG_RELID AND a.attname IN ({listed})
                       AND a.attgenerated = 'v') THEN
            RETURN NULL;
        END IF;
    END IF;"""
    # The text that the row's statement reads and writes is the table's of this name: a trigger that went along with
    # a renamed table would publish the rows of another. By name: a dump and load gives every table another oid.
    body = f"""
#variable_conflict use_column
DECLARE
    entity text;
    states bytea[];
    most   integer;
BEGIN
    IF TG_TABLE_SCHEMA <> {literal(capture.table_schema)} OR TG_TABLE_NAME <> {literal(capture.table)} THEN
        RAISE EXCEPTION 'outbox: %.% was captured as %', TG_TABLE_SCHEMA, TG_TABLE_NAME, {shown}
            USING ERRCODE = 'OB020', HINT = {
        literal(
            f"Call op.outbox_release({capture.table!r}, table_schema={capture.table_schema!r}) and capture the table "
            "that is to be published by its present name."
        )
    };
    END IF;
    IF TG_OP = 'TRUNCATE' THEN
        {truncate}
    END IF;{unchanged}
    IF TG_OP <> 'INSERT' THEN
        entity := {capture.key_of("OLD")};
{_write(capture, "OLD")}
    END IF;
    IF TG_OP = 'INSERT' OR (TG_OP = 'UPDATE' AND ({capture.key_of("NEW")}) COLLATE "C" <> entity) THEN
        entity := {capture.key_of("NEW")};
{_write(capture, "NEW")}
    END IF;
    RETURN NULL;
END
"""
    settings = "\n".join(f"    SET {name} = {literal(value)}" for name, value in TEXT_SETTINGS.items())
    return f"""CREATE FUNCTION {capture.function}() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = {SEARCH_PATH}
{settings}
    AS {dollars(body)}"""


def _write(capture: Capture, row: str) -> str:
    where = " AND ".join(f"t.{quote(c)} = {row}.{quote(c)}" for c in capture.key)
    s, name = quote(capture.schema), literal(capture.type)
    return f"""        SELECT array_agg(convert_to({capture.state_of}, 'UTF8')),
               (SELECT e.max_bytes FROM {s}.entity_types e WHERE e.name = {name}) INTO states, most
            FROM ONLY {capture.target} t WHERE {where};
        IF cardinality(states) > 1 THEN
            -- Under REPEATABLE READ the snapshot still has the row that made way for this one.
            RAISE EXCEPTION 'outbox: could not serialize access: % "%" was deleted by a concurrent transaction', {name},
                entity USING ERRCODE = 'serialization_failure', HINT = 'Run the transaction again.';
        END IF;
        -- The call costs as much as the rest of the check: only where it has something to say.
        IF (octet_length(entity) BETWEEN 1 AND 1024 AND coalesce(octet_length(states[1]), 0) <= most) IS NOT TRUE THEN
            PERFORM {s}.check_entry({name}, entity, coalesce(octet_length(states[1]), 0), NULL);
        END IF;
        INSERT INTO {s}.entries (type, key, state) VALUES ({name}, entity, states[1]);"""


def _pinned(declarations: str, body: str) -> str:
    """A block that runs under the function's settings and leaves the session's as they were."""
    settings = literal(orjson.dumps({"search_path": SEARCH_PATH, **TEXT_SETTINGS}).decode())
    text = f"""
#variable_conflict use_column
DECLARE
    pinned  jsonb := {settings};
    session jsonb := (SELECT jsonb_object_agg(p.key, current_setting(p.key)) FROM jsonb_each({settings}::jsonb) p);
{declarations.strip(chr(10))}
BEGIN
    PERFORM set_config(p.key, p.value, true) FROM jsonb_each_text(pinned) p;
{body.strip(chr(10))}
    PERFORM set_config(p.key, p.value, true) FROM jsonb_each_text(session) p;
END
"""
    return do(text)
