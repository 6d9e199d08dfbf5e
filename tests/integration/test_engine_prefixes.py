"""A saved state in another engine, on real models: the greedy answer is the uninterrupted one's.

A restored state followed by the same chunk gives the very same logits, so tokens are compared, not
probabilities.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmrun.engine.loop import Engine
from llmrun.engine.state_store import PrefixKey, StateStore
from llmrun.engine.types import Request, SamplingParams, SavedPrefix
from tests.fakes.models import gemma3_path, smollm2_path
from tests.fakes.tiny_mamba import tiny_mamba
from tests.integration.test_engine_sharing import open_checked
from tests.unit.test_engine_loop import Outcome, read

GREEDY = SamplingParams(temperature=0)
LARGE = 1 << 30


def ask(engine: Engine, prompt: Sequence[int], n: int = 12, **more: object) -> Outcome:
    request = Request(tuple(prompt), GREEDY, n, ignore_eog=True, **more)  # type: ignore[arg-type]
    return read(engine.submit(request))


def through_disk(engine: Engine, saved: SavedPrefix, folder: Path) -> SavedPrefix:
    """What comes back from a file."""
    store = StateStore(folder, LARGE, pytest.fail)
    key = PrefixKey("model", engine.state_key, "template")
    assert store.save(key, saved, owner="me")
    loaded = store.load_owned(key, "me")
    assert loaded is not None
    return loaded


@pytest.mark.parametrize(
    ("name", "n_prompt", "options"),
    [
        ("smol", 300, {}),
        ("smol", 300, {"flash_attn": "off"}),
        ("smol", 300, {"type_k": "q8_0", "type_v": "q8_0"}),
        ("gemma", 1400, {}),  # its window is 512
        ("gemma", 200, {"flash_attn": "off"}),
        ("mamba", 200, {"n_threads": 1}),
    ],
)
def test_a_resumed_answer_is_the_uninterrupted_one(
    name: str, n_prompt: int, options: dict[str, object], tmp_path: Path
) -> None:
    paths = {"smol": smollm2_path, "gemma": gemma3_path}
    path = paths[name]() if name in paths else tiny_mamba(tmp_path / "mamba.gguf")
    rng = random.Random(3)
    low, high = (5, 500) if name == "mamba" else (2000, 9000)
    prompt = [1 if name == "mamba" else 2, *(rng.randrange(low, high) for _ in range(n_prompt - 1))]
    more = [rng.randrange(low, high) for _ in range(9)]
    with open_checked(path, **options) as engine:
        first = ask(engine, prompt)
        turn = [*prompt, *first.tokens, *more]
        saved = engine.save_prefix(turn, LARGE)
        assert saved is not None and saved.tokens == tuple(turn[: n_prompt + 11])
        whole = ask(engine, turn)
        loaded = through_disk(engine, saved, tmp_path / "prefixes")
    # Another shape of engine where the shape may differ.
    with open_checked(path, **{"n_ctx": 4096, **options}) as engine:
        assert engine.restore_prefix(loaded) == len(loaded.tokens)
        if name != "mamba":
            assert engine._backend.seq_pos_min(0) == loaded.pos_min
        resumed = ask(engine, turn)
    assert resumed.finish.usage.n_cached == whole.finish.usage.n_cached == n_prompt + 11
    assert resumed.tokens == whole.tokens


@pytest.mark.parametrize("name", ["gemma", "mamba"])
def test_a_model_that_forgets_goes_back_by_its_checkpoints(name: str, tmp_path: Path) -> None:
    """The template dropped the thinking: the next prompt parts where the last one ended."""
    path = gemma3_path() if name == "gemma" else tiny_mamba(tmp_path / "mamba.gguf")
    options = {"n_ubatch": 256} if name == "gemma" else {"n_threads": 1}
    rng = random.Random(4)
    n_long = 900 if name == "gemma" else 100
    prompt = tuple(rng.randrange(5, 500) for _ in range(300))
    longer = (*prompt, *(rng.randrange(5, 500) for _ in range(n_long)))
    with open_checked(path, **options) as engine:
        ask(engine, prompt, 1)
        ask(engine, longer, 1)
        saved = engine.save_prefix(longer, LARGE)
        assert saved is not None and len(saved.checkpoints) == 2
        loaded = through_disk(engine, saved, tmp_path / "prefixes")
        turn = (*prompt, 7, 8, 9)
        whole = ask(engine, turn)
    with open_checked(path, **options) as engine:
        assert engine.restore_prefix(loaded) == len(loaded.tokens)
        resumed = ask(engine, turn)
    assert resumed.finish.usage.n_cached == whole.finish.usage.n_cached
    assert resumed.finish.usage.n_cached in (299, 300)
    assert resumed.tokens == whole.tokens


def test_what_does_not_match_is_refused_and_does_no_harm() -> None:
    prompt = list(range(300, 590))
    with open_checked(smollm2_path()) as engine:
        ask(engine, prompt, 2)
        saved = engine.save_prefix(prompt, LARGE)
        key = engine.state_key
    assert saved is not None
    for path, options in (
        (smollm2_path(), {"type_k": "q8_0", "type_v": "q8_0"}),
        (smollm2_path(), {"flash_attn": "off"}),
        (smollm2_path(), {"n_ctx": 256}),
        (gemma3_path(), {}),
    ):
        with open_checked(path, **options) as engine:
            # The file's name tells other models apart; here they are only looked at by the library.
            assert engine.state_key != key or "n_ctx" in options or path == gemma3_path()
            assert engine.restore_prefix(saved) == 0
            assert ask(engine, prompt[:90], 2).finish.usage.n_cached == 0
