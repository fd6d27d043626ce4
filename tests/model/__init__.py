"""A model of PostgreSQL, Kafka and writers, small enough to be explored exhaustively, around the relay's own code.

`world`: what the servers hold, and what may happen to it. `holder`: `outbox.shard.Shard` itself, moved from one call
of its ports to the next. `explore`: every interleaving, breadth first, so that what is found is found by the shortest
way. The positions, the judgement of the lineage, the plan of a batch and the order of a step are the relay's own; what
stands in for the servers is as unkind as they are allowed to be.
"""
