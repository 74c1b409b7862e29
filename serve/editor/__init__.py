"""The editor deployment: streams on one accelerator, their order, its capacity."""
