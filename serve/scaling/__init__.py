"""Which editor a stream goes to, who waits, and how many editors there shall be.

Decisions import nothing that runs, so that the simulation decides as the server does; the router is
Ray's.
"""
