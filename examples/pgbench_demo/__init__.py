"""The demo: stock `pgbench` is the owning service, and its tables are published to compacted Kafka topics.

`python -m pgbench_demo` (or `make demo`) starts a PostgreSQL and a Kafka of its own in a temporary directory, captures
three of pgbench's tables with their rows, runs the relay and pgbench side by side, and in the end reads the topics from
the start and compares them with the tables, key by key. It leaves nothing behind.
"""
