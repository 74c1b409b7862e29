"""Benchmarks that anyone can repeat with one command: `liveedit bench stream`.

May import training, evaluation and serving, which it measures; no stages.
"""

SCHEMA = 1  # of the JSON report
