"""Which models are served: what a reference stands for, now and after its alias has moved, which
version of it a session gets and what editors hold.

May import admission and settings, not the hub that keeps what is found here.
"""
