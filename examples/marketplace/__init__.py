"""A marketplace of three services that never call each other: what read models are for.

`adverts` and `users` own their data, each in a database of its own, and publish it. `search` keeps a read model of
both, in a database of its own, with its own full-text index. `web` serves a page with the search, and a panel from
which each of them, the relays and Kafka can be stopped and started. `python -m marketplace` starts all of it.
"""
