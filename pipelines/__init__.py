"""What a platform team schedules: stages, training, evaluation, the command line."""
