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
