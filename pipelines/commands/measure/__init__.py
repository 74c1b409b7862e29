"""Commands that measure: how fast (`bench`), how well (`evaluate`, `benchmark`, `ablate`).

May import what it measures.
"""
