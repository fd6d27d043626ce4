"""The development stack: real PostgreSQL and Kafka servers for tests, the demo and `make up`.

`devstack.postgres.Postgres` and `devstack.kafka.Kafka` are one server each; `python -m devstack` keeps both
running; `devstack/install.py` (standard library only, run by `make setup`) installs what they need.
Everything listens on the loopback interface only and is meant for development, never for real data.
"""
