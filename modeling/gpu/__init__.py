"""Everything that only a GPU runs; `accelerate` is its one door.

May import the networks and streams that it makes fast; Triton and CUDA are imported here alone.
"""
