-- Removes everything that version 1 made. The schema itself goes with outbox/schema.py, if it is empty then.
DROP FUNCTION {schema}.prune_slot(smallint, jsonb)
--;
DROP FUNCTION {schema}.unpublished(regclass, jsonb, bigint)
--;
DROP FUNCTION {schema}.adopt(bigint, bigint, bigint, text[])
--;
DROP FUNCTION {schema}.lock(text, text)
--;
DROP FUNCTION {schema}.delete(text, text, text, jsonb)
--;
DROP FUNCTION {schema}.put_bytes(text, text, bytea, text, text, jsonb)
--;
DROP FUNCTION {schema}.put(text, text, jsonb, text, jsonb)
--;
DROP FUNCTION {schema}.check_entry(text, text, integer, jsonb)
--;
DROP FUNCTION {schema}.app_progress(bigint, jsonb)
--;
DROP FUNCTION {schema}.report(bigint, smallint, jsonb)
--;
DROP TABLE {schema}.sealed
--;
DROP TABLE {schema}.request_outcomes
--;
DROP TABLE {schema}.requests
--;
DROP TABLE {schema}.entries
--;
DROP DOMAIN {schema}.entry_shard, {schema}.entry_type, {schema}.entry_key, {schema}.entry_headers, {schema}.entry_time
--;
DROP FUNCTION {schema}.ring()
--;
DROP FUNCTION {schema}.slot_of(timestamptz)
--;
DROP FUNCTION {schema}.shard_of(text, text)
--;
DROP TABLE {schema}.captures
--;
DROP TABLE {schema}.entity_types
--;
DROP FUNCTION {schema}.count_types_version()
--;
DROP TABLE {schema}.settings
