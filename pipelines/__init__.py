"""What a platform team schedules: stages, training, evaluation, the command line.

May import everything but the local stack; serving only where it serves, streams or measures.
"""
