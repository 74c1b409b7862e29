"""Whether a session is let in, where, how well it is edited, and how many editors there shall be.

Decisions import nothing that runs, so that the simulation decides as the server does; the router is
Ray's.
"""
