"""The page: a thin aggregator, and the panel."""
