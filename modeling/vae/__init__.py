"""The causal video VAEs: pixels to latents and back, a stream at a time."""
