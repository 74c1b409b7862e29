"""Pairs in, shards out, batches out; video decode and encode.

Imports of this tree the errors and the environment alone.
"""
