"""What the library finds in its environment when it loads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def load(**environment: str) -> str:
    """What OpenMP says of itself, in a process that loads the library with this environment."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    child = subprocess.run(
        [sys.executable, "-c", "from llmrun.engine.binding import *; import_binding()"],
        env={**clean, **environment, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP" not in child.stderr:
        pytest.skip("the library was not built with GNU's OpenMP")
    return child.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the policy is set where GNU's is usual")
def test_threads_spin_for_each_other_but_not_for_long() -> None:
    said = load()
    assert "GOMP_SPINCOUNT = '1000'" in said
    # Else a second model in the process would make the first one's threads sleep at once.
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in said


@pytest.mark.parametrize(
    ("name", "value", "n_spins"), [("GOMP_SPINCOUNT", "7", 7), ("OMP_WAIT_POLICY", "passive", 0)]
)
def test_what_the_user_has_set_stays(name: str, value: str, n_spins: int) -> None:
    said = load(**{name: value})
    assert f"GOMP_SPINCOUNT = '{n_spins}'" in said
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in said
