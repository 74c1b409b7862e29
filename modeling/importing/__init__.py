"""Public checkpoints as model directories.

May import the networks, and transformers where a checkpoint has its text encoder.
"""
