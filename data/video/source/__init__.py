"""A video file as it is: what it holds, its one clock, and how its frames are shown.

Imports of this tree `data.video.errors` alone.
"""
