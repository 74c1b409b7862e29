"""Benchmarks that anyone can repeat with one command: `liveedit bench stream`."""

SCHEMA = 1  # of the JSON report
