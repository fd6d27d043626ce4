"""Benchmarks: the real relay beside what a user would pick instead, as ratios, in interleaved rounds."""
