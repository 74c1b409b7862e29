"""Which models are served: what a reference stands for, now and after its alias has moved.

May import decisions and settings, not the hub that keeps what is found here.
"""
