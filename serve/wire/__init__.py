"""What travels: the public protocol, images, and the links between our processes."""
