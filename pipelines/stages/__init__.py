"""What the pipeline chains: one file a stage, and what runs them.

May import everything below the command line but benchmarks; serving only to edit over a connection.
"""
