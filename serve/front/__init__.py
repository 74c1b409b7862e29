"""The front deployment: sockets, sessions while they are connected, HTTP.

May import delivery, the hub, the wire and the video codec; knows no model.
"""
