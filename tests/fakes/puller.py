"""A child process that downloads a repository's large files: python -m tests.fakes.puller REPO.

Prints the snapshot paths; notes go to stderr. Exits with the error's code.
"""

from __future__ import annotations

import sys

from llmrun.errors import LlmrunError
from llmrun.hub.client import Hub
from llmrun.hub.download import download
from llmrun.hub.types import FileSet
from tests.fakes.progress import RecordingProgress


def main(repo: str) -> int:
    hub = Hub()
    try:
        listing = hub.listing(repo)
        files = tuple(file for file in listing.files if file.sha256)
        wanted = FileSet(repo, listing.revision, listing.commit, files)
        for path in download(hub, wanted, progress=RecordingProgress(echo=sys.stderr)):
            print(path)
    except LlmrunError as error:
        print(f"error: {error}\n{error.why}\n{error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
