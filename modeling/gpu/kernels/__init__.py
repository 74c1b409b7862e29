"""Triton kernels for what lies between the matrix products, each one pass over memory.

They compute in float32 and round where the plain path rounds, so that both paths stay close; what
is whole numbers gives the same bits. All tensors are contiguous unless said otherwise.

May import PyTorch, Triton, and of this tree what the plain path computes.
"""
