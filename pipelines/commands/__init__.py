"""The commands: one file each, signature and body together.

May import everything, each when it is called: the command line starts without PyTorch.
"""
