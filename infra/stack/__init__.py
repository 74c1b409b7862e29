"""The local stack.

Imports nothing of this tree.
"""
