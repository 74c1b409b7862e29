"""Editing pairs with exact truth from photos and clips that the user has."""
