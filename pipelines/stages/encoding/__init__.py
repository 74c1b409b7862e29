"""What the processes that encode pairs do, and how far they are.

May import the networks, datasets; knows no other stage.
"""
