"""What travels: the public protocol, images, and the links between our processes.

Imports of this tree the errors alone.
"""
