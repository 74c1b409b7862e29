"""The text encoders."""
