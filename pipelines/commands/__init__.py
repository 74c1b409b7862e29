"""The commands: one file each, signature and body together."""
