"""One video being edited: the stream, its caches and its state.

May import the networks and `detail`; loads no files.
"""
