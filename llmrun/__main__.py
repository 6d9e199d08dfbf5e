"""`python -m llmrun` is the same program as the `llmrun` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The whole program, on `argv` or the process's own words; the exit code."""
    try:
        # Here, so that Ctrl-C in the first tenth of a second ends in no traceback either.
        from llmrun.cli.app import main as run

        return run(argv)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
