"""Pairs in, shards out, batches out; video decode and encode."""
