-- What the writer asks of the server. Parameters are %(named)s; CAST instead of two colons, which SQLAlchemy's text()
-- would take for a parameter. The texts are constant, so that drivers prepare them.

-- name: exists
-- Whether the outbox is there: asked before anything else, since a missing table would end the caller's transaction.
SELECT to_regclass(CAST(%(table)s AS text)) IS NOT NULL

-- name: types
-- Whether this transaction holds a writer's lock on the table: then some of the types may be its own and be rolled back.
SELECT name, max_bytes, EXISTS (
    SELECT FROM pg_locks l
    WHERE l.locktype = 'relation' AND l.relation = to_regclass(CAST(%(table)s AS text)) AND l.granted
      AND l.pid = pg_backend_pid() AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND l.mode NOT IN ('AccessShareLock', 'RowShareLock'))
FROM {schema}.entity_types WHERE follows IS NULL

-- name: put
-- Only the columns that writers may fill: all others are defaults, the doorbell among them.
INSERT INTO {schema}.entries (type, key, state, content_type, cause, headers)
VALUES (CAST(%(type)s AS text), CAST(%(key)s AS text), CAST(%(state)s AS bytea), CAST(%(content_type)s AS text),
        CAST(%(cause)s AS text), CAST(CAST(%(headers)s AS text) AS jsonb))
RETURNING id

-- name: put_many
-- The ids are taken in the order of the arrays: the sort is below the defaults.
INSERT INTO {schema}.entries (type, key, state, content_type, cause, headers)
SELECT CAST(%(type)s AS text), new.key, new.state, new.content_type, new.cause, CAST(new.headers AS jsonb)
FROM unnest(CAST(%(keys)s AS text[]), CAST(%(states)s AS bytea[]), CAST(%(content_types)s AS text[]),
            CAST(%(causes)s AS text[]), CAST(%(headers)s AS text[]))
     WITH ORDINALITY AS new (key, state, content_type, cause, headers, place)
ORDER BY new.place
RETURNING id

-- name: lock
-- The state is read in a later statement: this one's own snapshot is older than the lock. The function refuses the
-- isolation levels in which all statements share one snapshot.
SELECT {schema}.lock(CAST(%(type)s AS text), CAST(%(key)s AS text))
