"""The front deployment: sockets, sessions, pacing, HTTP.

May import the hub, the wire and the video codec; knows no model.
"""
