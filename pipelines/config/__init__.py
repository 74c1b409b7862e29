"""What a pipeline does, as dataclasses, and how settings are merged over them.

May import sizes and tables of `modeling`, and hashes of `tracking`; OmegaConf and YAML are imported
here alone.
"""
