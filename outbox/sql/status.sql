-- name: outbox
SELECT name, shards::int, epoch, removed_id FROM {schema}.settings

-- name: types
SELECT name, topic FROM {schema}.entity_types

-- name: relays
-- The relay shows its state as its application name: publishing changes no row.
SELECT application_name, pid FROM pg_stat_activity
WHERE application_name LIKE %(name)s AND datname = current_database()

-- name: unpublished
-- By the same rule as reading, from the committed position: what is new since its point and not done by its cut. The
-- simple form is
--     WHERE shard = S AND (id > floor OR xid >= xmax OR xid = ANY (xip))
--       AND (no cut OR id > last_id OR xid >= xmax of its end OR xid = ANY (xip of its end))
-- but with OR it walks all that is retained. So: ranges that each have an index and share no row, as in reading. They
-- cost what is unpublished. `id + 0` keeps a range off the index on ids, which would walk the log up to there.
SELECT u.type, count(*), extract(epoch FROM clock_timestamp() - min(u.created_at))
FROM (
    -- Above the point's floor, and above what the cut has done.
    SELECT e.type, e.created_at FROM {schema}.entries e
    WHERE e.shard = %(shard)s::smallint AND e.id > greatest(%(floor)s::bigint, %(last_id)s::bigint)
    UNION ALL
    -- Above the floor, among what the cut has done, by transactions that its end does not see.
    SELECT e.type, e.created_at FROM {schema}.entries e
    WHERE e.shard = %(shard)s::smallint AND e.xid >= %(to_xmax)s::text::xid8
      AND e.id + 0 > %(floor)s::bigint AND e.id + 0 <= %(last_id)s::bigint
    UNION ALL
    SELECT e.type, e.created_at FROM {schema}.entries e
    WHERE e.shard = %(shard)s::smallint AND e.xid = ANY (%(to_xip)s::text::xid8[])
      AND e.id + 0 > %(floor)s::bigint AND e.id + 0 <= %(last_id)s::bigint
    UNION ALL
    -- At or below the floor, by transactions that the point does not see.
    SELECT e.type, e.created_at FROM {schema}.entries e
    WHERE e.shard = %(shard)s::smallint AND e.xid >= %(xmax)s::text::xid8 AND e.id + 0 <= %(floor)s::bigint
      AND (e.id > %(last_id)s::bigint OR e.xid >= %(to_xmax)s::text::xid8 OR e.xid = ANY (%(to_xip)s::text::xid8[]))
    UNION ALL
    SELECT e.type, e.created_at FROM {schema}.entries e
    WHERE e.shard = %(shard)s::smallint AND e.xid = ANY (%(xip)s::text::xid8[]) AND e.id + 0 <= %(floor)s::bigint
      AND (e.id > %(last_id)s::bigint OR e.xid >= %(to_xmax)s::text::xid8 OR e.xid = ANY (%(to_xip)s::text::xid8[]))
) u
GROUP BY u.type
