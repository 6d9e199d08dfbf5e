"""Terminal output shared by cli, repl and bench."""
