"""Faults on real servers: what is killed, frozen, cut, swallowed or taken away, and a checker that judges the topics.

`python -m faults` (or `make faults`) runs every case many times and prints a table; tests/test_faults.py runs a quick
selection. Processes are stopped by their ids, everything talks to the loopback interface, and ends by itself.
"""
