-- name: outbox
SELECT name, shards::int, epoch, removed_id FROM {schema}.settings

-- name: types
SELECT name, topic FROM {schema}.entity_types

-- name: relays
-- The relay shows its state as its application name: publishing changes no row.
SELECT application_name, pid FROM pg_stat_activity
WHERE application_name LIKE %(name)s AND datname = current_database()

-- name: unpublished
-- By the same rule as reading, from the committed position: what is new since its point and not done by its cut.
SELECT e.type, count(*), extract(epoch FROM clock_timestamp() - min(e.created_at))
FROM {schema}.entries e
WHERE e.shard = %(shard)s::smallint
  AND (e.id > %(floor)s::bigint OR e.xid >= %(xmax)s::text::xid8 OR e.xid = ANY (%(xip)s::text::xid8[]))
  AND (%(last_id)s::bigint IS NULL OR e.id > %(last_id)s::bigint OR e.id > %(to_floor)s::bigint
       OR e.xid >= %(to_xmax)s::text::xid8 OR e.xid = ANY (%(to_xip)s::text::xid8[]))
GROUP BY e.type
