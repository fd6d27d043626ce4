-- name: identify
-- Once a connection: whether this server can be published from at all.
SELECT pg_is_in_recovery(),
       pg_backend_pid(),
       s.schema_version, s.name, s.shards, s.doorbell,
       extract(epoch FROM s.retention)::double precision
FROM {schema}.settings s

-- name: system
-- Which cluster this is; some hosted servers do not allow it.
SELECT system_identifier::text FROM pg_catalog.pg_control_system()

-- name: sequence
-- The last id handed out, and the greatest id in the log: the first is never smaller, but in a copy.
SELECT (SELECT last_value FROM {schema}.entries_id_seq),
       coalesce((SELECT max(top.id) FROM generate_series(0, (SELECT shards - 1 FROM {schema}.settings)) AS s (shard),
                 LATERAL (SELECT e.id FROM {schema}.entries e WHERE e.shard = s.shard ORDER BY e.id DESC LIMIT 1) top), 0)

-- name: head
-- First statement of each batch: the batch's snapshot (S2), and everything that is judged as of it.
-- The insert LSN is read after S2 was taken: whatever S2 sees lies before it.
SELECT pg_current_snapshot()::text,
       pg_current_wal_insert_lsn(),
       ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int,
       s.epoch, s.removed_id, s.types_version, s.adopted_from, s.base_id,
       -- Looked up by its id, then compared: see `entries` on OFFSET 0 and the order.
       %(anchor_id)s::bigint IS NULL OR EXISTS (
           SELECT FROM (SELECT e.xid, e.created_at FROM {schema}.entries e
                        WHERE e.shard = %(anchor_shard)s::smallint
                          AND e.id >= %(anchor_id)s::bigint AND e.id <= %(anchor_id)s::bigint ORDER BY e.id OFFSET 0) e
           WHERE e.xid = %(anchor_xid)s::text::xid8
             AND (extract(epoch FROM e.created_at) * 1000000)::bigint = %(anchor_created)s::bigint),
       top.id, top.xid::text, top.created_us, top.shard,
       CASE WHEN s.types_version <> %(types_version)s::bigint THEN
           (SELECT coalesce(json_agg(json_build_array(t.name, t.topic, t.topic_settings, t.collapse, t.max_bytes, t.source,
                EXISTS (SELECT FROM {schema}.captures c
                        WHERE c.type = coalesce(t.follows, t.name) AND c.source = t.source),
                t.follows, t.reads_source)), '[]')
            FROM {schema}.entity_types t) END,
       -- Of those that name keys, thousands, one has its turn; the others wait, and come without.
       (SELECT json_agg(json_build_array(r.id, r.kind, CASE WHEN r.waits THEN '{}' ELSE r.arguments END,
                                         r.waits OR r.paused_at IS NOT NULL) ORDER BY r.id)
        FROM (SELECT r.*, r.kind = 'publish' AND row_number() OVER (PARTITION BY r.kind, r.paused_at IS NULL
                                                                    ORDER BY r.id) > 1 AS waits
              FROM {schema}.requests r
              WHERE r.finished_at IS NULL AND r.cancelled_at IS NULL AND r.kind <> 'app' AND NOT EXISTS (
                  SELECT FROM {schema}.request_outcomes o WHERE o.request = r.id AND o.shard = %(shard)s::smallint)) r)
FROM {schema}.settings s
LEFT JOIN LATERAL (
    -- The greatest entry visible in S2 in the whole table: one probe a shard.
    SELECT e.id, e.xid, (extract(epoch FROM e.created_at) * 1000000)::bigint AS created_us, e.shard
    FROM generate_series(0, s.shards - 1) AS n (shard),
         LATERAL (SELECT * FROM {schema}.entries e WHERE e.shard = n.shard ORDER BY e.id DESC LIMIT 1) e
    ORDER BY e.id DESC LIMIT 1) top ON true

-- name: entries
-- What is visible now (S2) and was not visible at the position's point (S1), in id order. The simple form is
--     WHERE shard = S AND visible in S2 AND (id > floor OR xid >= xmax(S1) OR xid = ANY (xip(S1)))
-- but with OR the planner may walk a whole index. So: ranges that each have an index, which share no row.
-- First: above the anchor. Then what is late, at or below it: by transactions that S1 did not know, and by those that
-- were in progress, each walked from where the cut is: an import of a million rows that commits late is read once.
-- What the first late range walks is all that is new, once a backlog: its ids are compared in the index, and hardly any
-- row is fetched. The order by xid, which nobody needs, keeps them on the index on transactions: for a slot that is
-- empty, or without statistics, the planner takes one index for as good as the other, and its plan stays while the slot
-- fills; and that on ids would have to walk the whole log.
-- The time as a double is half as dear as extract's numeric; the half of a microsecond makes up for its rounding.
-- In a cut the rows must also be visible in the snapshot at its end, and lie between what is done and the end's anchor.
-- `before` is a running sum that ends the batch at its limit in bytes; the first row always comes.
SELECT id, type, key, state, created_ms, content_type, cause, headers
FROM (
    SELECT b.*, sum(size) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) - size AS before
    FROM (
        (SELECT e.id, e.type, e.key, e.state, floor(date_part('epoch', e.created_at) * 1000 + 0.0005)::bigint AS created_ms,
                e.content_type, e.cause, e.headers::text AS headers,
                256 + length(e.key) + coalesce(octet_length(e.state), 0) + coalesce(length(e.cause), 0)
                + coalesce(length(e.headers::text), 0) AS size
         FROM {schema}.entries e
         WHERE e.shard = %(shard)s::smallint AND e.id > %(above)s::bigint AND e.id <= %(upto)s::bigint
           AND e.xid < %(xmax2)s::text::xid8 AND e.xid <> ALL (%(xip2)s::text::xid8[])
         ORDER BY e.id LIMIT {batch_rows})
        UNION ALL
        (SELECT e.id, e.type, e.key, e.state, floor(date_part('epoch', e.created_at) * 1000 + 0.0005)::bigint,
                e.content_type, e.cause, e.headers::text,
                256 + length(e.key) + coalesce(octet_length(e.state), 0) + coalesce(length(e.cause), 0)
                + coalesce(length(e.headers::text), 0)
         FROM (SELECT * FROM {schema}.entries e
               WHERE e.shard = %(shard)s::smallint AND e.xid >= %(xmax1)s::text::xid8
                 AND e.id <= %(floor)s::bigint AND e.id > %(last_id)s::bigint
                 AND e.xid < %(xmax2)s::text::xid8 AND e.xid <> ALL (%(xip2)s::text::xid8[])
               ORDER BY e.xid OFFSET 0) e
         ORDER BY e.id LIMIT {batch_rows})
        UNION ALL
        (SELECT e.id, e.type, e.key, e.state, floor(date_part('epoch', e.created_at) * 1000 + 0.0005)::bigint,
                e.content_type, e.cause, e.headers::text,
                256 + length(e.key) + coalesce(octet_length(e.state), 0) + coalesce(length(e.cause), 0)
                + coalesce(length(e.headers::text), 0)
         FROM unnest(%(xip1)s::text::xid8[]) AS late (xid),
              LATERAL (SELECT * FROM {schema}.entries e
                       WHERE e.shard = %(shard)s::smallint
                         AND (e.xid, e.id) > (late.xid, %(last_id)s::bigint)
                         AND (e.xid, e.id) <= (late.xid, %(floor)s::bigint)
                         AND e.xid < %(xmax2)s::text::xid8 AND e.xid <> ALL (%(xip2)s::text::xid8[])
                       ORDER BY e.xid, e.id LIMIT {batch_rows}) e
         ORDER BY e.id LIMIT {batch_rows})
        ORDER BY id LIMIT {batch_rows}
    ) b
) c
WHERE before < {batch_bytes}
ORDER BY id

-- name: fresh
-- The same where nothing can be late: at the start of a log.
SELECT id, type, key, state, created_ms, content_type, cause, headers
FROM (
    SELECT b.*, sum(size) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) - size AS before
    FROM (
        SELECT e.id, e.type, e.key, e.state, floor(date_part('epoch', e.created_at) * 1000 + 0.0005)::bigint AS created_ms,
               e.content_type, e.cause, e.headers::text AS headers,
                256 + length(e.key) + coalesce(octet_length(e.state), 0) + coalesce(length(e.cause), 0)
                + coalesce(length(e.headers::text), 0) AS size
        FROM {schema}.entries e
        WHERE e.shard = %(shard)s::smallint AND e.id > %(above)s::bigint AND e.id <= %(upto)s::bigint
          AND e.xid < %(xmax2)s::text::xid8 AND e.xid <> ALL (%(xip2)s::text::xid8[])
        ORDER BY e.id LIMIT {batch_rows}
    ) b
) c
WHERE before < {batch_bytes}
ORDER BY id

-- name: backlog
-- The same again for the next batch of a cut, read row by row: who reads ends it at the limit in bytes, since the
-- running sum would be half of what a row costs the server. `rows` are as many as are likely to fit.
SELECT e.id, e.type, e.key, e.state, floor(date_part('epoch', e.created_at) * 1000 + 0.0005)::bigint,
       e.content_type, e.cause, e.headers::text
FROM {schema}.entries e
WHERE e.shard = %(shard)s::smallint AND e.id > %(above)s::bigint AND e.id <= %(upto)s::bigint
  AND e.xid < %(xmax2)s::text::xid8 AND e.xid <> ALL (%(xip2)s::text::xid8[])
ORDER BY e.id LIMIT %(rows)s

-- name: last_retained
-- The last retained entry of each of some keys, as of the batch's snapshot: what a retry publishes.
SELECT DISTINCT ON (e.type, e.key)
       e.id, e.type, e.key, e.state, floor(date_part('epoch', e.created_at) * 1000 + 0.0005)::bigint,
       e.content_type, e.cause, e.headers::text
FROM {schema}.entries e
JOIN unnest(%(types)s::text[], %(keys)s::text[]) AS wanted (type, key) ON e.type = wanted.type AND e.key = wanted.key
WHERE e.shard = %(shard)s::smallint AND e.id >= %(from_id)s::bigint AND e.id > %(removed_id)s::bigint
ORDER BY e.type, e.key, e.id DESC

-- name: window
-- The next so many entries, whatever they are of: how many there are, how many of them a batch may hold by their bytes, and
-- where those end.
SELECT count(*), count(*) FILTER (WHERE before < {batch_bytes}), max(id) FILTER (WHERE before < {batch_bytes})
FROM (SELECT id, sum(size) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) - size AS before
      FROM (SELECT e.id, 256 + length(e.key) + coalesce(octet_length(e.state), 0) + coalesce(length(e.headers::text), 0) AS size
            FROM {schema}.entries e WHERE e.shard = %(shard)s::smallint AND e.id > %(after)s::bigint
            ORDER BY e.id LIMIT %(rows)s) w) w

-- name: history
-- The chosen entries of a window of the log, as of the batch's snapshot.
SELECT e.id, e.type, e.key, e.state, floor(date_part('epoch', e.created_at) * 1000 + 0.0005)::bigint,
       e.content_type, e.cause, e.headers::text
FROM {schema}.entries e
WHERE e.shard = %(shard)s::smallint AND e.id > %(after)s::bigint AND e.id <= %(upto)s::bigint
  AND e.type = %(type)s::text
  AND (%(keys)s::text[] IS NULL OR e.key = ANY (%(keys)s::text[]))
ORDER BY e.id

-- name: flush_lsn
-- Up to where the write-ahead log is on the server's disk.
SELECT pg_current_wal_flush_lsn()::text

-- name: flushed
-- Whether everything up to an LSN is on the server's disk.
SELECT pg_current_wal_flush_lsn() >= %(lsn)s::pg_lsn

-- name: flush
-- Makes it so: an empty message in the write-ahead log, flushed (PostgreSQL 17 and newer).
SELECT pg_logical_emit_message(false, 'outbox', '', true)

-- name: flush_by_commit
-- The same before 17: a transaction that wrote to the log is flushed when it commits.
SELECT pg_logical_emit_message(true, 'outbox', '')

-- name: try_bell
-- Falling asleep: hold the doorbell, so that writers ring. Never waits.
SELECT pg_try_advisory_lock(%(bell)s::bigint)

-- name: release_bell
SELECT pg_advisory_unlock(%(bell)s::bigint)

-- name: report
SELECT {schema}.report(%(request)s::bigint, %(shard)s::smallint, %(outcome)s::jsonb)

-- name: adopt
SELECT now_epoch, taken FROM {schema}.adopt(%(epoch)s::bigint, %(floor)s::bigint, %(least_epoch)s::bigint, %(from_systems)s::text[])
