"""Frames edited at a working size and shown at the source's, with the source's own detail.

May import sizes; on a GPU `gpu` gives the same bits.
"""
