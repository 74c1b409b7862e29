"""LiveEdit-Bench: any system's edits of the 120 clips of `data.bench`, in figures and pictures.

May import `data.bench` and the measures beside it.
"""
