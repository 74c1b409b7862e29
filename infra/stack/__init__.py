"""The local stack.

May import `infra.runtime`.
"""
