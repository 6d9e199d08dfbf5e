"""Kill a download ten times, let it finish, then start three at once; print what it cost.

    python scripts/pull_under_fire.py [--cli] [--megabytes 60] [--kills 10] [--seed 1]

A hub on loopback serves one random file. Without `--cli` the child calls the library; with it,
`python -m llmrun pull`. Printed: bytes served over file size (aim: under 1.05), and how many
downloads three processes make of one file (aim: one).
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.fakes.loopback_hub import LoopbackHub

REPO, FILE = "org/big", "big-Q4_0.gguf"


def header() -> bytes:
    """A small, well-formed GGUF header, so that a program that reads it first is content."""
    key, value = b"general.architecture", b"llama"
    return (
        b"GGUF"
        + (3).to_bytes(4, "little")
        + (0).to_bytes(8, "little")
        + (1).to_bytes(8, "little")
        + len(key).to_bytes(8, "little")
        + key
        + (8).to_bytes(4, "little")
        + len(value).to_bytes(8, "little")
        + value
    )


def child_command(use_cli: bool) -> list[str]:
    if use_cli:
        return [sys.executable, "-m", "llmrun", "pull", f"{REPO}:Q4_0", "--yes", "--force"]
    return [sys.executable, "-m", "tests.fakes.puller", REPO]


def on_disk(cache: Path) -> int:
    """Bytes of the unfinished download that are on disk, by its record."""
    from llmrun.hub.parts import load_done

    for record in cache.glob("*/blobs/*.llmrun.parts.incomplete"):
        etag = record.name.partition(".")[0]
        partial = record.with_name(f"{etag}.llmrun.incomplete")
        try:
            size = int(record.read_text().partition('"size": ')[2].partition(",")[0])
        except (OSError, ValueError):
            return 0
        return sum(end - start for start, end in load_done(record, partial, size))
    return 0


def kill_at(process: subprocess.Popen[bytes], cache: Path, n_bytes: int) -> bool:
    """SIGKILL `process` once `n_bytes` are on disk; False when it finished before."""
    while process.poll() is None:
        if on_disk(cache) >= n_bytes:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cli", action="store_true", help="run `llmrun pull`")
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    size = args.megabytes * 1_000_000
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source = root / FILE
        start = header()
        source.write_bytes(start + rng.randbytes(size - len(start)))
        expected = hashlib.sha256(source.read_bytes()).hexdigest()
        with LoopbackHub({REPO: {FILE: source}}) as hub:
            hub.delay_s = 0.004  # about 16 MB/s on each connection
            environment = hub.environment(root / "one")
            cache = root / "one" / "hf" / "hub"
            kills = 0
            for point in sorted(rng.randrange(size // 50, size) for _ in range(args.kills)):
                process = subprocess.Popen(
                    child_command(args.cli), env=environment, stdout=subprocess.DEVNULL
                )
                kills += kill_at(process, cache, point)
                print(f"killed {kills} times; {on_disk(cache):>10,} bytes on disk", flush=True)
            subprocess.run(child_command(args.cli), env=environment, check=True)
            served = hub.served[FILE]
            (blob,) = (cache / "models--org--big" / "blobs").iterdir()
            assert blob.name == hashlib.sha256(blob.read_bytes()).hexdigest() == expected
            print(
                f"killed {kills} times, then finished: {served:,} bytes served / {size:,} "
                f"= {served / size:.4f}"
            )

            hub.served.clear()
            environment = hub.environment(root / "three")
            processes = [
                subprocess.Popen(child_command(args.cli), env=environment) for _ in range(3)
            ]
            codes = [process.wait() for process in processes]
            ratio = hub.served[FILE] / size
            print(f"three at once: exit codes {codes}, {ratio:.4f} downloads served")
    return 0 if served / size < 1.05 and ratio < 1.05 and not any(codes) else 1


if __name__ == "__main__":
    sys.exit(main())
