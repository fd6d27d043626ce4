-- The outbox, version 1. Rendered by outbox/schema.py:
--   {schema}        the schema's name, quoted
--   {name}          the outbox's name, a literal
--   {channel}       the notification channel: the schema's name, a literal
--   {bell}          the doorbell's advisory lock key (bigint), from the schema's name
--   {shards}        number of shards, fixed for the life of the outbox
--   {shard}         the share of a key, as an expression of type and key; {shard_source} where the column takes it from
--   {slots}         number of ring slots, fixed
--   {slot_seconds}  how long the clock points at one slot, seconds
--   {retention}     how long published entries are kept, an interval literal
--   {doorbell}      true or false
-- Statements are separated by a line that holds only "--;".

CREATE TABLE {schema}.settings (
    only_row       boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    name           text        NOT NULL CHECK (name ~ '^[a-zA-Z0-9._-]{{1,100}}$'),
    schema_version integer     NOT NULL,
    shards         smallint    NOT NULL CHECK (shards BETWEEN 1 AND 1024),
    epoch          bigint      NOT NULL DEFAULT 1,
    slots          smallint    NOT NULL CHECK (slots BETWEEN 3 AND 1000),
    slot_seconds   integer     NOT NULL CHECK (slot_seconds > 0),
    retention      interval    NOT NULL,
    doorbell       boolean     NOT NULL,
    -- The greatest entry id that pruning has removed. Slots are pruned out of order, so whoever starts without
    -- a position, replays or adopts must leave out every id up to this one.
    removed_id     bigint      NOT NULL DEFAULT 0,
    -- Counts every change of entity_types: the relay reads them again when it grows.
    types_version  bigint      NOT NULL DEFAULT 1,
    -- The system identifiers of all clusters whose positions a person gave up when the log was adopted: a shard may
    -- not have started since the one before the last.
    adopted_from   text[]      NOT NULL DEFAULT '{{}}',
    -- Ids of this epoch lie above it: a shard that has published a greater one was not heard by who adopted.
    base_id        bigint      NOT NULL DEFAULT 0,
    created_at     timestamptz NOT NULL DEFAULT now(),
    -- The ring must be longer than what it retains, or the clock comes round to a slot that is still kept.
    CONSTRAINT retention_fits_the_ring
        CHECK (extract(epoch FROM retention) <= slot_seconds::bigint * (slots - 1))
)
--;
INSERT INTO {schema}.settings (name, schema_version, shards, slots, slot_seconds, retention, doorbell)
VALUES ({name}, 1, {shards}, {slots}, {slot_seconds}, {retention}, {doorbell})
--;
CREATE TABLE {schema}.entity_types (
    name           text        PRIMARY KEY CHECK (name <> '' AND octet_length(name) <= 200),
    topic          text        NOT NULL CHECK (topic ~ '^[a-zA-Z0-9._-]{{1,249}}$' AND topic NOT IN ('.', '..')),
    -- Settings of the topic that differ from the defaults, by Kafka's names, and "partitions".
    topic_settings jsonb       NOT NULL DEFAULT '{{}}' CHECK (jsonb_typeof(topic_settings) = 'object'),
    collapse       boolean     NOT NULL DEFAULT true,
    -- Greatest size of a state, bytes, uncompressed. The default is a little under Kafka's max.message.bytes.
    max_bytes      integer     NOT NULL DEFAULT 1000000 CHECK (max_bytes BETWEEN 1 AND 100000000),
    -- A query with the columns key and state (and headers, cause, content_type), or null: for backfill, replay, reconcile.
    source         text,
    -- When reconcile takes two states for the same: json (as values), bytes, a Python function (MODULE:ATTRIBUTE), or
    -- null: as their content type says.
    comparison     text        CHECK (comparison IN ('json', 'bytes') OR comparison ~ '^[^:]+:[^:]+$'),
    -- The entity type whose changes this one follows, or null: it has no entries of its own, and carries the same
    -- entities to another topic. Of a follower there is no follower.
    follows        text        REFERENCES {schema}.entity_types CHECK (follows <> name),
    -- Whether a change is published as what `source` says of the key, instead of the state that was written.
    reads_source   boolean     NOT NULL DEFAULT false,
    -- Of a follower: whether its topic has had all that there is since before it followed.
    complete       boolean     NOT NULL DEFAULT false,
    created_at     timestamptz NOT NULL DEFAULT now(),
    CHECK (source IS NOT NULL OR NOT reads_source)
)
--;
-- Tables whose rows are published by a trigger; op.outbox_capture fills it.
CREATE TABLE {schema}.captures (
    table_schema  text   NOT NULL,
    table_name    text   NOT NULL,
    -- Once: two tables under one type would overwrite each other's keys. A type whose table is captured stays.
    type          text   NOT NULL UNIQUE REFERENCES {schema}.entity_types,
    key_columns   text[] NOT NULL,
    state         text   NOT NULL,
    on_truncate   text   NOT NULL CHECK (on_truncate IN ('refuse', 'tombstones')),
    -- The trigger function, in this schema.
    function_name text   NOT NULL,
    -- The source query that goes with it; the type has it, unless it had one of its own.
    source        text   NOT NULL,
    PRIMARY KEY (table_schema, table_name)
)
--;
CREATE FUNCTION {schema}.count_types_version() RETURNS trigger LANGUAGE plpgsql AS $body$
BEGIN
    UPDATE {schema}.settings SET types_version = types_version + 1;
    RETURN NULL;
END
$body$
--;
CREATE TRIGGER count_version AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON {schema}.entity_types
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.count_types_version()
--;
-- The share of a key. The count is part of the function: it is fixed when the outbox is created.
CREATE FUNCTION {schema}.shard_of(type text, key text) RETURNS smallint
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    RETURN {shard}
--;
-- Which slot of the ring the clock points at. Not extract(): that computes with numeric, which each insert would feel.
CREATE FUNCTION {schema}.slot_of(at timestamptz) RETURNS smallint
    LANGUAGE sql STABLE STRICT PARALLEL SAFE
    RETURN ((date_part('epoch', at)::bigint / {slot_seconds}) % {slots})::smallint
--;
-- The doorbell: a sleeping relay holds its shard's lock exclusively. Granted: it is awake, stay silent. Refused: ring
-- (all of them: they listen on one channel). CASE fixes the order of evaluation; always null.
CREATE FUNCTION {schema}.ring() RETURNS text
    LANGUAGE sql VOLATILE
    RETURN CASE WHEN {bells_granted} THEN NULL
                ELSE nullif(pg_notify({channel}, '')::text, '') END
--;
-- What the log's columns may hold. Domains, since an insert parses and plans each CHECK constraint of its table anew
-- (8 us, with a plain insert at 40), and a domain's once a session.
CREATE DOMAIN {schema}.entry_shard AS smallint CHECK (VALUE BETWEEN 0 AND {shards} - 1)
--;
CREATE DOMAIN {schema}.entry_type AS text CHECK (octet_length(VALUE) <= 200)
--;
CREATE DOMAIN {schema}.entry_key AS text CHECK (VALUE <> '' AND octet_length(VALUE) <= 1024)
--;
CREATE DOMAIN {schema}.entry_headers AS jsonb CHECK (jsonb_typeof(VALUE) = 'object')
--;
CREATE DOMAIN {schema}.entry_time AS timestamptz CHECK (isfinite(VALUE))
--;
-- The log. xid comes before id on purpose: defaults are evaluated in the order of the columns, so a transaction
-- has its xid before it takes its first id, and an id below the anchor with a later xid does not arise (the
-- reader looks for it all the same).
CREATE TABLE {schema}.entries (
    xid          xid8        NOT NULL DEFAULT pg_current_xact_id(),
    id           bigint      NOT NULL GENERATED BY DEFAULT AS IDENTITY (CACHE 1),
    slot         smallint    NOT NULL DEFAULT {schema}.slot_of(clock_timestamp()),
    -- With one shard a default, with more an expression of the columns and no function: what is generated is planned
    -- anew by each insert, and reading a function's body took 20 us.
    shard        {schema}.entry_shard NOT NULL {shard_source},
    type         {schema}.entry_type  NOT NULL,
    key          {schema}.entry_key   NOT NULL,
    state        bytea,                 -- null: a tombstone
    content_type text,                  -- null: JSON
    cause        text,
    headers      {schema}.entry_headers,  -- an object of strings, or null
    created_at   {schema}.entry_time  NOT NULL DEFAULT clock_timestamp(),
    bell         text        DEFAULT {bell_default}
) PARTITION BY LIST (slot)
--;
-- One partition a slot, all made here: no DDL runs afterwards.
DO $body$
BEGIN
    FOR slot IN 0 .. {slots} - 1 LOOP
        EXECUTE format('CREATE TABLE %s.%I PARTITION OF %s.entries FOR VALUES IN (%s)',
                       {schema_literal}, 'entries_' || slot, {schema_literal}, slot);
    END LOOP;
END
$body$
--;
CREATE INDEX entries_shard_id ON {schema}.entries (shard, id)
--;
-- With the id a large transaction is read in pieces, and an insert costs less than with (shard, xid): no duplicates are
-- packed together.
CREATE INDEX entries_shard_xid ON {schema}.entries (shard, xid, id)
--;
-- What the command line asks of the relay. The relay writes no row here: it calls report().
CREATE TABLE {schema}.requests (
    id           bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    -- An `app` is none of the relay's: the service's own code does it, and says here how far it is.
    kind         text        NOT NULL CHECK (kind IN ('retry', 'drop', 'publish', 'backfill', 'history', 'app')),
    arguments    jsonb       NOT NULL DEFAULT '{{}}',
    requested_at timestamptz NOT NULL DEFAULT now(),
    paused_at    timestamptz,
    cancelled_at timestamptz,
    progress     jsonb,
    -- When the last shard said what became of it.
    finished_at  timestamptz
)
--;
-- What is open is looked at with every batch, however many there were before.
CREATE INDEX requests_open ON {schema}.requests (id) WHERE finished_at IS NULL AND cancelled_at IS NULL
--;
CREATE TABLE {schema}.request_outcomes (
    request     bigint      NOT NULL REFERENCES {schema}.requests ON DELETE CASCADE,
    shard       smallint    NOT NULL,
    outcome     jsonb       NOT NULL,
    finished_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (request, shard)
)
--;
-- Slots that pruning has found old and could not empty at once: the greatest id in it then, and who might hold a
-- smaller one.
CREATE TABLE {schema}.sealed (
    slot    smallint PRIMARY KEY,
    last_id bigint   NOT NULL,
    -- The transactions, by their virtual ids, that had the log open to write in it.
    writers text[]   NOT NULL
)
--;
-- The relay says what became of a request. Once a shard: saying it again changes nothing. What was over a month ago is
-- forgotten.
CREATE FUNCTION {schema}.report(request bigint, shard smallint, outcome jsonb) RETURNS void
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- Two shards that report at once: the second counts the first's.
    SELECT FROM {schema}.requests r WHERE r.id = report.request FOR UPDATE;
    INSERT INTO {schema}.request_outcomes (request, shard, outcome)
    SELECT r.id, report.shard, report.outcome FROM {schema}.requests r WHERE r.id = report.request
    ON CONFLICT DO NOTHING;
    UPDATE {schema}.requests r SET finished_at = clock_timestamp()
    WHERE r.id = report.request AND r.finished_at IS NULL
      AND (SELECT count(*) FROM {schema}.request_outcomes o WHERE o.request = r.id) >=
          (SELECT s.shards FROM {schema}.settings s);
    DELETE FROM {schema}.requests r
    WHERE coalesce(r.finished_at, r.cancelled_at) < clock_timestamp() - interval '30 days';
END
--;
-- How far the service's own backfill is. The request's row is locked until the transaction ends, in which `told` is
-- true, and what it says is written: two processes take turns. Null when there is no such request; it is over once
-- `told` says so ("done").
CREATE FUNCTION {schema}.app_progress(request bigint, told jsonb) RETURNS jsonb
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    r {schema}.requests%ROWTYPE;
BEGIN
    SELECT * INTO r FROM {schema}.requests x WHERE x.id = app_progress.request AND x.kind = 'app' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF told IS NOT NULL THEN
        UPDATE {schema}.requests x SET progress = told WHERE x.id = r.id;
        IF (told->>'done')::boolean THEN
            INSERT INTO {schema}.request_outcomes (request, shard, outcome)
            SELECT r.id, n, CASE n WHEN 0 THEN told ELSE '{{}}' END
            FROM generate_series(0, (SELECT s.shards FROM {schema}.settings s) - 1) AS n
            ON CONFLICT DO NOTHING;
            UPDATE {schema}.requests x SET finished_at = clock_timestamp() WHERE x.id = r.id;
        END IF;
    END IF;
    RETURN jsonb_build_object(
        'progress', coalesce(told, r.progress),
        'state', CASE WHEN r.cancelled_at IS NOT NULL THEN 'cancelled' WHEN r.paused_at IS NOT NULL THEN 'paused'
                      ELSE 'running' END);
END
$body$
--;
-- Refuses what could not be published. SQLSTATE: OB001 unknown entity type, OB002 key, OB003 state too large,
-- OB004 no state, OB005 headers. Whoever writes one entry looks first whether it is needed: the call costs 12 us.
CREATE FUNCTION {schema}.check_entry(type text, key text, bytes integer, headers jsonb) RETURNS void
    LANGUAGE plpgsql STABLE AS $body$
DECLARE
    most integer;
BEGIN
    SELECT t.max_bytes INTO most FROM {schema}.entity_types t WHERE t.name = check_entry.type AND t.follows IS NULL;
    IF most IS NULL THEN
        RAISE EXCEPTION 'outbox: unknown entity type "%" (key "%")', check_entry.type, left(check_entry.key, 100)
            USING ERRCODE = 'OB001',
                  HINT = 'Register it in a migration (op.outbox_add_type) or with: outbox types add NAME --topic TOPIC';
    END IF;
    IF coalesce(check_entry.key, '') = '' OR octet_length(check_entry.key) > 1024 THEN
        RAISE EXCEPTION 'outbox: the key "%" of an entity of type "%" has % bytes; it needs 1 to 1024',
                left(check_entry.key, 100), check_entry.type, coalesce(octet_length(check_entry.key), 0)
            USING ERRCODE = 'OB002', HINT = 'Use the entity''s primary key as text.';
    END IF;
    IF check_entry.bytes > most THEN
        RAISE EXCEPTION 'outbox: the state of % "%" has % bytes, its type allows %', check_entry.type,
                left(check_entry.key, 100), check_entry.bytes, most
            USING ERRCODE = 'OB003',
                  HINT = format('Make the state smaller, or raise the limit: outbox types change %s --max-bytes N, '
                                'then: outbox topics apply', check_entry.type);
    END IF;
    IF check_entry.headers IS NOT NULL AND (jsonb_typeof(check_entry.headers) <> 'object' OR EXISTS (
        SELECT FROM jsonb_each(CASE jsonb_typeof(check_entry.headers) WHEN 'object' THEN check_entry.headers
                                    ELSE '{{}}' END) h
        WHERE jsonb_typeof(h.value) <> 'string' OR h.key IN ('outbox-id', 'content-type', 'cause')))
    THEN
        RAISE EXCEPTION 'outbox: the headers of % "%" must be a JSON object of strings, without outbox-id, '
                        'content-type and cause', check_entry.type, left(check_entry.key, 100)
            USING ERRCODE = 'OB005', HINT = 'Pass for example ''{{"tenant": "7"}}''.';
    END IF;
END
$body$
--;
CREATE FUNCTION {schema}.put(type text, key text, state jsonb, cause text DEFAULT NULL, headers jsonb DEFAULT NULL)
    RETURNS bigint LANGUAGE plpgsql AS $body$
DECLARE
    bytes bytea := convert_to(state::text, 'UTF8');
    most  integer;
    entry bigint;
BEGIN
    IF put.state IS NULL THEN
        RAISE EXCEPTION 'outbox: no state for % "%"', put.type, left(put.key, 100)
            USING ERRCODE = 'OB004', HINT = 'To publish a tombstone call outbox.delete(type, key).';
    END IF;
    SELECT t.max_bytes INTO most FROM {schema}.entity_types t WHERE t.name = put.type AND t.follows IS NULL;
    IF (octet_length(put.key) BETWEEN 1 AND 1024 AND octet_length(bytes) <= most AND put.headers IS NULL)
       IS NOT TRUE THEN
        PERFORM {schema}.check_entry(put.type, put.key, octet_length(bytes), put.headers);
    END IF;
    INSERT INTO {schema}.entries (type, key, state, cause, headers)
    VALUES (put.type, put.key, bytes, put.cause, put.headers) RETURNING id INTO entry;
    RETURN entry;
END
$body$
--;
CREATE FUNCTION {schema}.put_bytes(type text, key text, state bytea, content_type text,
                                   cause text DEFAULT NULL, headers jsonb DEFAULT NULL)
    RETURNS bigint LANGUAGE plpgsql AS $body$
DECLARE
    most  integer;
    entry bigint;
BEGIN
    IF put_bytes.state IS NULL THEN
        RAISE EXCEPTION 'outbox: no state for % "%"', put_bytes.type, left(put_bytes.key, 100)
            USING ERRCODE = 'OB004', HINT = 'To publish a tombstone call outbox.delete(type, key).';
    END IF;
    SELECT t.max_bytes INTO most FROM {schema}.entity_types t WHERE t.name = put_bytes.type AND t.follows IS NULL;
    IF (octet_length(put_bytes.key) BETWEEN 1 AND 1024 AND octet_length(put_bytes.state) <= most
        AND put_bytes.headers IS NULL) IS NOT TRUE THEN
        PERFORM {schema}.check_entry(put_bytes.type, put_bytes.key, octet_length(put_bytes.state), put_bytes.headers);
    END IF;
    INSERT INTO {schema}.entries (type, key, state, content_type, cause, headers)
    VALUES (put_bytes.type, put_bytes.key, put_bytes.state, put_bytes.content_type, put_bytes.cause,
            put_bytes.headers) RETURNING id INTO entry;
    RETURN entry;
END
$body$
--;
CREATE FUNCTION {schema}.delete(type text, key text, cause text DEFAULT NULL, headers jsonb DEFAULT NULL)
    RETURNS bigint LANGUAGE plpgsql AS $body$
DECLARE
    most  integer;
    entry bigint;
BEGIN
    SELECT t.max_bytes INTO most FROM {schema}.entity_types t WHERE t.name = delete.type AND t.follows IS NULL;
    IF (octet_length(delete.key) BETWEEN 1 AND 1024 AND most IS NOT NULL AND delete.headers IS NULL)
       IS NOT TRUE THEN
        PERFORM {schema}.check_entry(delete.type, delete.key, 0, delete.headers);
    END IF;
    INSERT INTO {schema}.entries (type, key, state, cause, headers)
    VALUES (delete.type, delete.key, NULL, delete.cause, delete.headers) RETURNING id INTO entry;
    RETURN entry;
END
$body$
--;
-- For services that have no row to lock: take it, then read the state in a later statement, then put.
-- Refuses (OB006) every isolation level whose snapshot is older than the lock: what is read after it would be stale,
-- and nothing else tells (SERIALIZABLE lets two that only read and publish through).
CREATE FUNCTION {schema}.lock(type text, key text) RETURNS void LANGUAGE plpgsql VOLATILE AS $body$
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'outbox: lock of % "%" was called under %: the snapshot is older than the lock, so what is '
                        'read after it may be stale', lock.type, left(lock.key, 100),
                        upper(current_setting('transaction_isolation'))
            USING ERRCODE = 'OB006', HINT = 'Use READ COMMITTED, or lock and update a row of the entity.';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtextextended(lock.key, hashtextextended(lock.type, {bell})));
END
$body$
--;
-- Adoption: every retained entry is made new, in id order. Called by the relay or `outbox adopt`.
--   expected_epoch  the epoch that the caller saw; another one: somebody adopted already, nothing is done
--   floor           the greatest anchor of all shards: new ids are above it
--   least_epoch     the new epoch is at least this (a restored database may be behind the positions)
--   from_systems    the clusters whose positions are given up, when a person decided so; none: the same cluster
-- Returns the epoch in force, and how many entries were made new (null: somebody had adopted already). READ COMMITTED
-- only: the entries must be read after the lock was taken.
CREATE FUNCTION {schema}.adopt(expected_epoch bigint, floor bigint, least_epoch bigint DEFAULT 0,
                               from_systems text[] DEFAULT '{{}}', OUT now_epoch bigint, OUT taken bigint)
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    removed   bigint;
    handed    bigint;
    greatest_id bigint;
    base      bigint;
    by_time   boolean;
    seq       text := pg_get_serial_sequence({schema_literal} || '.entries', 'id');
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'outbox: adopt must run in READ COMMITTED, not in %', current_setting('transaction_isolation')
            USING ERRCODE = 'OB010';
    END IF;
    -- Writers (and prepared transactions that wrote) keep a smaller id for a newer state: wait for them, let none in.
    LOCK TABLE {schema}.entries IN SHARE ROW EXCLUSIVE MODE;
    SELECT s.epoch, s.removed_id INTO now_epoch, removed FROM {schema}.settings s FOR UPDATE;
    IF now_epoch <> expected_epoch THEN
        RETURN;
    END IF;
    -- Of another cluster, perhaps: its transactions say nothing here.
    DELETE FROM {schema}.sealed;
    EXECUTE format('SELECT last_value FROM %s', seq) INTO handed;
    -- A copy whose sequence fell behind has given newer entries smaller ids, or the same again: there the time tells
    -- which came first. One writer of an entity waits for the other, so that their times are in the order of commits.
    SELECT max(e.id), coalesce(max(e.id), 0) > handed OR count(*) <> count(DISTINCT e.id)
        INTO greatest_id, by_time FROM {schema}.entries e;
    base := greatest(handed, adopt.floor, greatest_id, 0);
    WITH renumbered AS (
        SELECT e.tableoid AS part, e.ctid AS place,
               base + row_number() OVER (ORDER BY CASE WHEN by_time THEN e.created_at END, e.id) AS new_id
        FROM {schema}.entries e WHERE e.id > removed
    )
    UPDATE {schema}.entries e SET id = r.new_id, xid = pg_current_xact_id()
        FROM renumbered r WHERE e.tableoid = r.part AND e.ctid = r.place;
    GET DIAGNOSTICS taken = ROW_COUNT;
    -- What pruning went past keeps its id and stays left out; but the xid of another cluster may lie in the future, and
    -- would count as new when that comes.
    UPDATE {schema}.entries e SET xid = pg_current_xact_id() WHERE e.id <= removed;
    PERFORM setval(seq, base + taken + 1, false);
    UPDATE {schema}.settings SET epoch = greatest(now_epoch + 1, least_epoch),
                                 adopted_from = ARRAY(SELECT DISTINCT unnest(adopted_from || from_systems)),
                                 base_id = base
        RETURNING epoch INTO now_epoch;
END
$body$
--;
-- Whether a shard has entries, in one slot or in all (`part`), up to an id, that a committed position has not published:
-- the rule of reading, a probe of an index each. `p` is an element of what prune_slot takes.
CREATE FUNCTION {schema}.unpublished(part regclass, p jsonb, upto bigint)
    RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    in_cut  boolean := p->'cut'->>'last_id' IS NOT NULL;
    -- Without a snapshot, at the start of a log, what pruning went past stays left out.
    begun   boolean := (p->>'xmax')::numeric < 9223372036854775807;
    found   boolean;
    -- $3 and $4: the id that all lies above, and the anchor; $5 and $6: the snapshot's xmax and xip.
    query   text := format($q$
        SELECT EXISTS (SELECT FROM %1$s e WHERE e.shard = $1 AND e.id <= $2 AND e.id > greatest($3, $4))
            OR EXISTS (SELECT FROM %1$s e WHERE e.shard = $1 AND e.id <= $2 AND e.xid >= $5 AND e.id > $3)
            OR EXISTS (SELECT FROM %1$s e WHERE e.shard = $1 AND e.id <= $2 AND e.xid = ANY ($6) AND e.id > $3)
    $q$, part);
BEGIN
    -- New since the point and not yet done by the cut ...
    EXECUTE query INTO found USING (p->>'shard')::smallint, upto,
        CASE WHEN in_cut THEN (p->'cut'->>'last_id')::bigint ELSE 0 END, (p->>'anchor')::bigint, (p->>'xmax')::xid8,
        ARRAY(SELECT x::xid8 FROM jsonb_array_elements_text(p->'xip') x);
    IF in_cut AND NOT found THEN
        -- ... or not visible at the cut's end.
        EXECUTE query INTO found USING (p->>'shard')::smallint, upto,
            CASE WHEN begun THEN 0 ELSE (p->>'anchor')::bigint END, (p->'cut'->>'anchor')::bigint,
            (p->'cut'->>'xmax')::xid8, ARRAY(SELECT x::xid8 FROM jsonb_array_elements_text(p->'cut'->'xip') x);
    END IF;
    RETURN found;
END
$body$
--;
-- Empties one slot of the ring, if nothing needs it any more. What takes long is looked at before the slot's lock is
-- taken; under it, which holds writers up, only what may have come since.
--   slot       which
--   positions  for each shard the committed position, as a JSON array of
--              {{"shard", "epoch", "anchor", "xmax", "xip": [..], "cut": null |
--                {{"anchor", "xmax", "xip": [..], "last_id"}}, "row": null | [id, xid, created, shard]}} - ids, xids and
--              microseconds since 1970 as decimal strings; "row" is the anchor's, which must be there
-- Returns {{"pruned": bool, "entries": rows removed, "reason": text or null}}.
-- A lock that is not to be had within the session's lock_timeout raises 55P03: the caller goes on with the next.
--
-- Whoever starts without a position, or adopts, leaves out every id up to the greatest that was removed. So all of them,
-- in whatever slot, must have been published, and no open transaction may hold one: a slot is *sealed* with the
-- transactions that have the log open to write in it when it is first found old, and emptied when those have ended:
-- whoever holds an id has had that lock since before the id was handed out, and no transaction id tells as much.
CREATE FUNCTION {schema}.prune_slot(slot smallint, positions jsonb)
    RETURNS jsonb LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    part     regclass;
    whole    regclass := ({schema_literal} || '.entries')::regclass;
    conf     {schema}.settings%ROWTYPE;
    seal     {schema}.sealed%ROWTYPE;
    newest   timestamptz;
    later    timestamptz;
    writers  text[];
    last_id  bigint;
    last_now bigint;
    rows_in  bigint;
    p        jsonb;
    kept     text;
    newest_sql text := 'SELECT max(e.created_at), max(e.id) FROM generate_series(0, $1 - 1) AS n (shard), LATERAL '
        '(SELECT e.id, e.created_at FROM %s e WHERE e.shard = n.shard AND e.id > $2 ORDER BY e.id DESC LIMIT 1) e';
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'outbox: prune must run in READ COMMITTED, not in %', current_setting('transaction_isolation')
            USING ERRCODE = 'OB010';
    END IF;
    SELECT * INTO STRICT conf FROM {schema}.settings;
    IF prune_slot.slot NOT BETWEEN 0 AND conf.slots - 1 THEN
        RAISE EXCEPTION 'outbox: there is no ring slot %', prune_slot.slot USING ERRCODE = 'OB011';
    END IF;
    part := ({schema_literal} || '.' || quote_ident('entries_' || prune_slot.slot))::regclass;
    -- Most slots are too young: the newest by id tells, and costs a probe.
    EXECUTE format(newest_sql, part) INTO newest, last_id USING conf.shards::int, -1;
    IF newest IS NULL THEN
        RETURN jsonb_build_object('pruned', false, 'entries', 0, 'reason', 'empty');
    END IF;
    IF newest <= clock_timestamp() - conf.retention THEN
        -- A clock that was set back: the newest by id need not be the newest by time.
        EXECUTE format('SELECT max(created_at), max(id), count(*) FROM %s', part) INTO newest, last_id, rows_in;
    END IF;
    IF newest > clock_timestamp() - conf.retention THEN
        RETURN jsonb_build_object('pruned', false, 'entries', 0, 'reason', 'retained');
    END IF;
    -- Two that prune would wait for each other: each looks at all slots and then locks one.
    IF NOT pg_try_advisory_xact_lock(hashtextextended('prune', {bell})) THEN
        RETURN jsonb_build_object('pruned', false, 'entries', 0, 'reason', 'somebody else is pruning');
    END IF;
    FOR s IN 0 .. conf.shards - 1 LOOP
        SELECT x INTO p FROM jsonb_array_elements(prune_slot.positions) x WHERE (x->>'shard')::int = s;
        kept := CASE
            WHEN p IS NULL OR (p->>'epoch')::bigint IS DISTINCT FROM conf.epoch
                THEN format('shard %s has not published it (no position)', s)
            -- A database that lost its tail hands ids and transaction ids out again: what bears them only looks published.
            WHEN p->>'row' IS NOT NULL AND NOT EXISTS (
                    SELECT FROM {schema}.entries e
                    WHERE e.shard = (p->'row'->>3)::smallint AND e.id = (p->'row'->>0)::bigint
                      AND e.xid = (p->'row'->>1)::xid8
                      AND (extract(epoch FROM e.created_at) * 1000000)::bigint = (p->'row'->>2)::bigint)
                THEN format('the anchor of shard %s is gone: the log is to be adopted first', s)
            -- An anchor is the greatest entry of the whole table, of any shard; the next one may be about to be committed.
            WHEN last_id >= coalesce((p->'cut'->>'anchor')::bigint, (p->>'anchor')::bigint)
                THEN format('holds the anchor of shard %s, or may hold its next', s)
        END;
        IF kept IS NOT NULL THEN
            RETURN jsonb_build_object('pruned', false, 'entries', 0, 'reason', kept);
        END IF;
    END LOOP;
    -- It publishes older states before newer ones: what it has not come to must not go away.
    SELECT format('is replayed: request %s', min(r.id)) INTO kept FROM {schema}.requests r
    WHERE r.kind = 'history' AND r.finished_at IS NULL AND r.cancelled_at IS NULL HAVING count(*) > 0;
    IF kept IS NOT NULL THEN
        RETURN jsonb_build_object('pruned', false, 'entries', 0, 'reason', kept);
    END IF;
    writers := ARRAY(
        SELECT DISTINCT l.virtualtransaction FROM pg_locks l
        WHERE l.relation = whole AND l.mode = 'RowExclusiveLock' AND l.granted
          -- (a prepared transaction has no process)
          AND l.pid IS DISTINCT FROM pg_backend_pid()
          AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()));
    SELECT * INTO seal FROM {schema}.sealed x WHERE x.slot = prune_slot.slot;
    IF seal.last_id IS DISTINCT FROM last_id THEN
        INSERT INTO {schema}.sealed AS x VALUES (prune_slot.slot, last_id, writers)
            ON CONFLICT ON CONSTRAINT sealed_pkey DO UPDATE SET last_id = excluded.last_id, writers = excluded.writers
            RETURNING * INTO seal;
    END IF;
    IF seal.writers && writers THEN
        RETURN jsonb_build_object('pruned', false, 'entries', 0,
                                  'reason', 'sealed: a transaction is open that may hold older entries');
    END IF;
    FOR p IN SELECT jsonb_array_elements(prune_slot.positions) LOOP
        IF {schema}.unpublished(whole, p, last_id) THEN
            RETURN jsonb_build_object('pruned', false, 'entries', 0,
                                      'reason', format('shard %s has not published it, or an older entry', p->>'shard'));
        END IF;
    END LOOP;
    EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', part);
    EXECUTE format(newest_sql, part) INTO later, last_now USING conf.shards::int, last_id;
    IF later IS NOT NULL THEN
        RETURN jsonb_build_object('pruned', false, 'entries', 0, 'reason', 'written to meanwhile');
    END IF;
    PERFORM FROM {schema}.settings x WHERE x.epoch = conf.epoch FOR UPDATE;
    IF NOT FOUND THEN
        RETURN jsonb_build_object('pruned', false, 'entries', 0, 'reason', 'adopted meanwhile');
    END IF;
    UPDATE {schema}.settings SET removed_id = greatest(removed_id, last_id);
    DELETE FROM {schema}.sealed x WHERE x.slot = prune_slot.slot;
    EXECUTE format('TRUNCATE %s', part);
    RETURN jsonb_build_object('pruned', true, 'entries', rows_in, 'reason', NULL);
END
$body$
--;
-- Nothing is for everybody: what a writer and a relay need is granted to the roles that the migration names.
REVOKE ALL ON ALL TABLES IN SCHEMA {schema} FROM PUBLIC
--;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA {schema} FROM PUBLIC
