"""The causal video VAEs: pixels to latents and back, a stream at a time.

May import sizes; knows nothing of what edits latents.
"""
