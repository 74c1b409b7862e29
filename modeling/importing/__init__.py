"""Public checkpoints as model directories."""
