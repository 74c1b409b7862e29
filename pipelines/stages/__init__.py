"""What the training loop trains: one small class a stage, all with the shape of `base.Stage`."""
