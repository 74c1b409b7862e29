"""The video transformer and what trains and samples it: attention, positions, noise, losses."""
