"""The benchmarks: the relay beside what a user would pick instead, and beside the limit, in one run on one machine.

`python -m bench PART` runs one part and keeps its figures as JSON under `.bench/`, or, when it was a small run, under
`.bench/trial/`; `python -m bench report` writes those of full runs into docs/performance.md; without a part all are run
and then written. Absolute figures say little about another machine: what counts are the ratios, taken in interleaved
rounds whose spread is shown. Everything listens and sends on the loopback interface only, and ends by itself.

What publishes is a contender; what a part can be asked to measure, contenders, limits or circumstances, are its peers.
"""
