"""DeepSpeed: an engine a network, the weights in it, and their average.

May import the settings; `inside` alone imports DeepSpeed, and is the one door to what that does not
promise to keep.
"""
