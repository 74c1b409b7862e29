"""One video being edited: the stream, its caches and its state."""
