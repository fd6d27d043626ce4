-- name: ring
SELECT slots, shards::int, extract(epoch FROM retention)::float8 FROM {schema}.settings

-- name: newest
-- For each slot that holds something, the seconds since the newest entry that lies in it *or has a smaller id than its
-- last one*: ids tell the true order, times only what the server's clock said. While the clock was set back, entries got
-- a time at which older ones were not even written; none of them is older than those. Times of the future tell nothing.
WITH ends AS (
    SELECT s.slot, max(e.id) AS id
    FROM generate_series(0, %(slots)s - 1) AS s (slot), generate_series(0, %(shards)s - 1) AS n (shard), LATERAL
         (SELECT e.id FROM {schema}.entries e WHERE e.slot = s.slot AND e.shard = n.shard ORDER BY e.id DESC LIMIT 1) e
    GROUP BY s.slot
)
SELECT ends.slot, extract(epoch FROM clock_timestamp() - max(e.created_at))::float8,
       extract(epoch FROM clock_timestamp())::float8
FROM ends, generate_series(0, %(slots)s - 1) AS s (slot), generate_series(0, %(shards)s - 1) AS n (shard), LATERAL
     (SELECT e.created_at FROM {schema}.entries e
      WHERE e.slot = s.slot AND e.shard = n.shard AND e.id <= ends.id AND e.created_at <= clock_timestamp()
      ORDER BY e.id DESC LIMIT 1) e
GROUP BY ends.slot

-- name: slots
-- Each slot: about how many entries it holds, when its first and last by id were written, whether it is being filled.
-- A small one is counted. A large one is estimated: from the server's statistics, or where it has none (after a crash, in
-- a copy) from its ids.
SELECT n.slot::int,
       CASE WHEN pg_relation_size(p.part) <= 1048576 THEN
                (SELECT count(*) FROM {schema}.entries e WHERE e.slot = n.slot)
            ELSE coalesce(nullif(greatest(pg_stat_get_live_tuples(p.part),
                                          (SELECT c.reltuples::bigint FROM pg_class c WHERE c.oid = p.part), 0), 0),
                          ends.last_id - ends.first_id + 1)
            END,
       ends.oldest, ends.newest, n.slot = {schema}.slot_of(clock_timestamp())
FROM {schema}.settings s,
     generate_series(0, s.slots - 1) AS n (slot),
     LATERAL (SELECT to_regclass(quote_ident(%(schema)s) || '.entries_' || n.slot)::oid AS part) p,
     LATERAL (SELECT min(f.created_at) AS oldest, max(l.created_at) AS newest, min(f.id) AS first_id, max(l.id) AS last_id
              FROM generate_series(0, s.shards - 1) AS h (shard)
              LEFT JOIN LATERAL (SELECT e.id, e.created_at FROM {schema}.entries e
                                 WHERE e.slot = n.slot AND e.shard = h.shard ORDER BY e.id LIMIT 1) f ON true
              LEFT JOIN LATERAL (SELECT e.id, e.created_at FROM {schema}.entries e
                                 WHERE e.slot = n.slot AND e.shard = h.shard ORDER BY e.id DESC LIMIT 1) l ON true) ends
ORDER BY n.slot
