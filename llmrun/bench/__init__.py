"""Measures speed, latency and memory of a model on this machine, and what each setting buys."""
