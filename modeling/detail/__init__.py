"""Frames edited at a working size and shown at the source's, with the source's own detail."""
