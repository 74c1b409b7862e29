"""Editing pairs with exact truth from photos and clips that the user has.

May import `video`, `sample` and what draws.
"""
