"""The shared records of an application: sessions, commits, what every process reports."""
