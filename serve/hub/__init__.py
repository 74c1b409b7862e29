"""The shared records of an application: sessions, commits, what every process reports, and who is
placed where.

May import admission, versions and the wire.
"""
