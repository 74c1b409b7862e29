"""The training loop on Ray Train and DeepSpeed.

May import the networks, datasets, settings and evaluation; knows no stages.
"""
