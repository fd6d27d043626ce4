"""The benchmarks: the relay beside what a user would pick instead, and beside the limit, in one run on one machine.

`python -m bench PART` runs one part and keeps its figures as JSON under `.bench/`; `python -m bench report` writes
them into docs/performance.md. Absolute figures say little about another machine: what counts are the ratios, taken
in interleaved rounds whose spread is shown. Everything listens and sends on the loopback interface only, and ends by
itself.
"""
