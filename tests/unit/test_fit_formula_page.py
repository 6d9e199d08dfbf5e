"""The page of Gemma 4's needs: what its script makes, so that it cannot grow stale."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "gemma4_memory.py"
    spec = importlib.util.spec_from_file_location("gemma4_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_closed_form_says_within_two_per_cent(script):
    """The page's figures are llama.cpp's; the closed form is near enough to notice a change."""
    page = script.PAGE.read_text(encoding="utf-8").replace(
        "llama.cpp's own allocator for headers", "llmrun's closed form for headers"
    )
    made = script.render(script.compute_needs(exact=False), exact=False)
    lines = list(zip(page.splitlines(), made.splitlines(), strict=True))
    assert len(lines) > 80
    for written, expected in lines:
        if not written.startswith("|"):
            assert written == expected
            continue
        assert _NUMBER.sub("#", written) == _NUMBER.sub("#", expected)
        pairs = zip(_NUMBER.findall(written), _NUMBER.findall(expected), strict=True)
        for a, b in pairs:
            # Percentages are whole numbers with a sign.
            tolerance = 1 if a[0] in "+-" else max(0.02 * float(b), 0.02)
            assert abs(float(a) - float(b)) <= tolerance, (written, expected)


def test_the_page_has_every_model_quant_and_context(script):
    needs = script.compute_needs(exact=False)
    assert len(needs) == 5 * 3 * 3
    by_key = {(n.model.title, n.quant, n.n_ctx): n for n in needs}
    e4b = by_key["E4B", "q4_k_m", 8192]
    assert 5.8e9 < e4b.total_bytes < 6.0e9
    assert e4b.gpu_bytes < e4b.total_bytes - 2e9
    text = script.PAGE.read_text(encoding="utf-8")
    assert "| 31B | F16 | 61.4 |" in text
    assert "69.9 (" in text and "62 (" in text
