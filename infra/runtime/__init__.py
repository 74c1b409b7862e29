"""The ground that serving and pipelines both stand on.

Imports nothing of this tree; `ray_private` is the one door to what Ray does not promise to keep.
"""
