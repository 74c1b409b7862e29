"""A session from its client's frames back to it: what waits, who edits it, what was left out, at
which pace it leaves.

May import the hub's records and the wire; knows no socket.
"""
