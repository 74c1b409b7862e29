"""Pairs in, shards out, batches out; video decode and encode.

Imports of this tree `infra.runtime.errors` alone.
"""
