"""What this machine has: CPU, memory, accelerators."""
