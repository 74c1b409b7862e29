"""How well a model edits: metrics, tables, pictures.

May import the editor, datasets and the settings; no training.
"""
