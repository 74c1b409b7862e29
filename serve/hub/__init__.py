"""The shared records of an application: sessions, commits, what every process reports.

May import decisions and the wire.
"""
