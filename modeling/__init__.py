"""The mathematics, in plain PyTorch: networks, losses, caches, VAE, text, noise, the editor.

Imports PyTorch, NumPy, safetensors, and of this tree the errors alone.
"""
