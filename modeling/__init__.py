"""The mathematics, in plain PyTorch: networks, caches, VAE, text, flow matching, the editor."""
