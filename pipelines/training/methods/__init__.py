"""What the training loop trains: one small class a method, all with the shape of `base.Stage`."""
