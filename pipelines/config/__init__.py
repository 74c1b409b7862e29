"""What a pipeline does, as dataclasses, and how settings are merged over them."""
