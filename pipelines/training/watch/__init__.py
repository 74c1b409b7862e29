"""What is seen of a training from outside: its figures, and where it stands.

May import the job, its folder and its figures.
"""
