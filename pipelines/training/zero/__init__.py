"""DeepSpeed: an engine a network, the weights in it, and their average.

`inside` is the one door to what DeepSpeed does not promise to keep.
"""
