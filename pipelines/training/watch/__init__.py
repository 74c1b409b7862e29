"""What is seen of a training from outside: its figures, and where it stands."""
