"""`python -m llmrun` is the same program as the `llmrun` command."""

import sys

from llmrun.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
