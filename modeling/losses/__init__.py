"""The losses of the trained stages, as pure functions: a file each.

May import noise schedules; knows no networks.
"""
