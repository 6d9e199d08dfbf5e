"""Whether and how a model fits a machine."""
