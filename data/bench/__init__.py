"""LiveEdit-Bench: 120 held-out clips whose right edit is known, the same on every machine.

May import the drawn pairs and the footage.
"""
