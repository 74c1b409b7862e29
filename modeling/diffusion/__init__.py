"""The video transformer and what trains and samples it: attention, positions, noise.

May import sizes; knows no streams, VAEs or files.
"""
