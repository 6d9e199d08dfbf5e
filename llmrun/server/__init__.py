"""The HTTP server: dialects, models, safety."""
