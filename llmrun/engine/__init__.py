"""Tokens in, tokens out: the thread that drives llama.cpp. Knows nothing of hub, cli or ui."""
