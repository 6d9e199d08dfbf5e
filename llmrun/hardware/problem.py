"""A thing to mend, as `advice.find_problems` returns it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Problem:
    """`what` is wrong, `why`, and a `hint` that mends it: a command that can be pasted, or a
    sentence. "advice": nothing is broken, but there is more to be had. None of the three ends with
    a full stop."""

    what: str
    why: str
    hint: str
    severity: Literal["problem", "advice"] = "problem"
