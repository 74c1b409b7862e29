"""The text encoders.

May import sizes, and transformers where UMT5 is loaded.
"""
