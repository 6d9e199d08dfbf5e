"""Model names: the built-in catalog and the resolution of a reference to files."""
