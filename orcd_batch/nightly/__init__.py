"""The nightly check: one job run in many ways, every result compared, and what changed named."""
