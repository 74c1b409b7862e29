"""How well a model edits: metrics, tables, pictures."""
