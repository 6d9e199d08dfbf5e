"""Reading and checking GGUF files without llama.cpp. Pure: no third-party import."""
