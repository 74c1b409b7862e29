"""The editor deployment: streams on one accelerator, their order, its capacity.

May import the model, the hub and the wire; knows no sockets and no clients.
"""
