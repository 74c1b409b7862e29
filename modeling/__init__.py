"""The mathematics, in plain PyTorch: networks, caches, VAE, text, flow matching, the editor.

Imports PyTorch, NumPy, safetensors, and of this tree the errors alone.
"""
