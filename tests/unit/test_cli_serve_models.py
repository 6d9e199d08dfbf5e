"""Which models a server has and how they are planned, loaded and closed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmrun.catalog.entries import Catalog, CatalogEntry
from llmrun.cli.acquire import resolve_model
from llmrun.cli.draft import Draft, count_draft
from llmrun.cli.serve_models import EMBED_PARALLEL, ServedModels, _embed_wishes, apply_room
from llmrun.engine.types import Request
from llmrun.errors import NotFoundError, UsageError, WillNotFitError
from llmrun.fit.plan import Wishes
from llmrun.fit.speed_log import SpeedLog
from llmrun.gguf.info import read_info
from llmrun.hardware.machine import Cpu, Device, Machine, Memory
from llmrun.server.opener import RAM, Room
from tests.fakes.cli import GB, Cli, FakeServices
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.served import invocation_of, served
from tests.fakes.tiny_bert import TinyBert
from tests.unit.test_cli_gates import FailingLoads

MB = 10**6
ENTRY = CatalogEntry(
    name="tiny",
    title="Tiny",
    family="tiny",
    repo="org/tiny-GGUF",
    file=None,
    quant="Q8_0",
    n_bytes=None,
    approximate=False,
    licence="MIT",
    aliases=("tiny-instruct", "tiny:1b"),
    capabilities=("tools",),
)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path, FakeEngine(["x" * 50]), catalog=Catalog([ENTRY]))


def names(models: ServedModels) -> list[str]:
    return [card.name for card in models.cards()]


# ---- what is served


def test_the_store_under_the_catalogs_names_where_it_has_them(cli: Cli):
    cli.store_model()
    cli.store_model(name="tiny-F16.gguf", file_type=1)
    cli.store_model(repo="other/thing-GGUF", name="thing-F32.gguf", file_type=0)
    cli.store_partial()
    models = served(cli)
    assert names(models) == ["tiny:f16", "tiny", "other/thing-GGUF:F32"]
    card = models.find("tiny")
    assert (card.quant, card.architecture, card.n_ctx) == ("Q8_0", "llama", 2048)
    assert card.can_chat and card.can_call_tools and not card.can_embed
    assert card.n_params > 0 and card.n_bytes > 0 and card.modified_s > 0
    assert (card.repo, card.license, len(card.digest)) == ("org/tiny-GGUF", "apache-2.0", 64)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("tiny", "tiny"),
        ("Tiny:Latest", "tiny"),
        ("tiny-instruct", "tiny"),
        ("tiny:1b", "tiny"),
        ("tiny:q8_0", "tiny"),
        ("tiny:F16", "tiny:f16"),
        ("org/tiny-GGUF", "tiny"),
        ("org/tiny-GGUF:latest", "tiny"),
        ("ORG/tiny-gguf:q8_0", "tiny"),
        ("org/tiny-GGUF:tiny-F16.gguf", "tiny:f16"),
        ("hf://org/tiny-GGUF:F16", "tiny:f16"),
        ("other/thing-GGUF", "other/thing-GGUF:F32"),
    ],
)
def test_what_requests_may_call_a_model(cli: Cli, text: str, name: str):
    cli.store_model()
    cli.store_model(name="tiny-F16.gguf", file_type=1)
    cli.store_model(repo="other/thing-GGUF", name="thing-F32.gguf", file_type=0)
    assert served(cli).find(text).name == name


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("tiny:q4_0", "llmrun pull tiny:q4_0"),
        ("org/other-GGUF:Q8_0", "llmrun pull org/other-GGUF:Q8_0"),
        ("org/tiny-GGUF@abc1234:Q8_0", "llmrun pull org/tiny-GGUF@abc1234:Q8_0"),
        ("-hf org/x-GGUF", "llmrun pull '-hf org/x-GGUF'"),
        ("https://example.com/tiny.gguf", None),
        ("", None),
        ("\x1b[2Jtiny", None),
        ("a b c", None),
    ],
)
def test_what_is_not_here_says_how_to_get_it(cli: Cli, text: str, hint: str | None):
    cli.store_model()
    with pytest.raises(NotFoundError) as caught:
        served(cli).find(text)
    assert caught.value.hint == hint
    assert "\x1b" not in caught.value.message


def test_a_name_that_is_nearly_right(cli: Cli):
    cli.store_model()
    with pytest.raises(NotFoundError) as caught:
        served(cli).find("tyny")
    assert "did you mean tiny" in (caught.value.why or "")


def test_named_models_are_all_there_is(cli: Cli):
    cli.store_model()
    cli.store_model(repo="other/thing-GGUF", name="thing-F32.gguf", file_type=0)
    models = served(cli, "tiny")
    assert names(models) == ["tiny"]
    with pytest.raises(NotFoundError, match="not served here"):
        models.find("other/thing-GGUF")


def test_with_pulls_allowed_the_store_is_there_too(cli: Cli):
    cli.store_model()
    cli.store_model(repo="other/thing-GGUF", name="thing-F32.gguf", file_type=0)
    assert names(served(cli, "tiny", allow_pull=True)) == ["tiny", "other/thing-GGUF:F32"]


def test_a_file_is_shown_by_its_name_alone(cli: Cli):
    path = cli.model("My Model\x1b-Q8_0.gguf")
    models = ServedModels(invocation_of(cli), [path])
    (name,) = models.prepare()
    assert name == "My Model\\x1b-Q8_0"
    assert str(cli.folder) not in name
    for text in (name, f"{name}:latest", path, "my model\x1b-q8_0.gguf"):
        assert models.find(text).name == name


def test_two_files_of_one_name(cli: Cli):
    first = cli.model()
    (cli.folder / "more").mkdir()
    second = cli.model("more/tiny-Q8_0.gguf", seed=2)
    models = ServedModels(invocation_of(cli), [first, second, first])
    assert models.prepare() == ("tiny-Q8_0", "tiny-Q8_0-2")
    assert models.find(second).name == "tiny-Q8_0-2"


def test_a_model_that_is_pulled_while_the_server_runs_is_there(cli: Cli):
    models = served(cli)
    assert names(models) == []
    cli.store_model()
    assert names(models) == ["tiny"]


def test_a_broken_file_in_the_store_is_left_out(cli: Cli):
    link = cli.store_model()
    link.resolve().write_bytes(b"GGUF" + b"\xff" * 100)
    assert names(served(cli)) == []


def test_headers_are_read_once(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    cli.store_model()
    models = served(cli)
    before = models.cards()

    def fail(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("llmrun.gguf.info.read_info", fail)
    assert models.cards() == before


def test_embedding_models_and_rerankers_say_what_they_are(cli: Cli):
    TinyBert().write(cli.folder / "bert.gguf")
    TinyBert(classifier=True, pooling_type=4).write(cli.folder / "rank.gguf")
    embed, rank = served(cli, *(str(cli.folder / f"{n}.gguf") for n in ("bert", "rank"))).cards()
    assert (embed.can_chat, embed.can_embed, embed.can_rerank) == (False, True, False)
    assert (rank.can_chat, rank.can_embed, rank.can_rerank) == (False, False, True)


# ---- loading


def opened(models: ServedModels, name: str, **more: Any) -> Any:
    return models.open(models.find(name), "chat", more.pop("room", Room()), **more)


def test_a_model_is_loaded_for_several_streams(cli: Cli):
    path = cli.model(n_ctx_train=8192)
    found = opened(served(cli, path), path)
    ((paths, options),) = cli.services.opened
    assert paths == (Path(path),)
    assert (options.n_seq_max, options.n_ctx, options.kv_unified) == (4, 4 * 8192, False)
    assert (found.n_parallel, found.n_ctx, found.kv_unified) == (4, 8192, False)
    assert found.engine.facts.n_layers == 2
    assert found.memory_bytes == found.uses[RAM] > found.unseen_bytes > 0
    assert "fits" in found.plan_line


def test_the_settings_reach_the_engine(cli: Cli):
    path = cli.model()
    found = opened(
        served(cli, path, n_parallel=3, ctx=1000, speculative="off", threads=2, temperature=0.25),
        path,
    )
    options = cli.services.opened[0][1]
    assert (options.n_seq_max, options.n_ctx) == (3, 3000)
    assert (options.speculative, options.n_threads, options.steady_threads) == ("off", 2, False)
    assert found.sampling.temperature == 0.25
    assert found.n_ctx == 1000


@pytest.mark.parametrize(
    ("settings", "kv_unified", "n_ctx"),
    [
        ({}, True, 32768),
        ({"kv_unified": "off"}, False, 8192),
        ({"kv_unified": "on", "ctx": 1000}, True, 1000),
        ({"ctx": 1000}, False, 1000),
        ({"ctx": 1000, "n_parallel": 1, "kv_unified": "off"}, True, 1000),
    ],
)
def test_one_cache_for_all_streams_or_one_for_each(
    cli: Cli, settings: dict[str, Any], kv_unified: bool, n_ctx: int
):
    path = cli.model(n_ctx_train=32768)
    # Unasked, four streams get 8192 tokens each.
    found = opened(served(cli, path, **settings), path)
    options = cli.services.opened[0][1]
    assert (options.kv_unified, found.kv_unified) == (kv_unified, kv_unified)
    assert found.n_ctx == n_ctx


def test_after_a_load_that_failed_streams_share_one_cache_again(cli: Cli):
    cli.engine = FailingLoads(1)
    path = cli.model(n_ctx_train=8192)
    found = opened(served(cli, path), path)
    first, second = (options for _, options in cli.services.opened)
    assert (first.kv_unified, second.kv_unified) == (False, True)
    assert first.n_ctx > second.n_ctx == found.n_ctx
    assert found.kv_unified
    notes = cli.services.environment.stderr.getvalue()
    assert "KV cache for all streams instead of for each stream" in notes


def test_what_has_a_cache_as_it_is_opened_is_counted_so(cli: Cli):
    """An embedder, and the model that drafts, have one cache whatever the streams have."""
    TinyBert().write(cli.folder / "bert.gguf")
    bert = str(cli.folder / "bert.gguf")
    models = served(cli, bert, kv_unified="off")
    wishes = _embed_wishes(models._look_at(models.find("bert"), Room()), "embed")[1]
    assert wishes.n_seq > 1 and wishes.shares_cells
    path = cli.model(n_ctx_train=8192)
    invocation = invocation_of(cli)
    draft = Draft(resolve_model(invocation, path), read_info([Path(path)]))
    machine = cli.services.machine()
    wishes = Wishes(n_ctx=8192, n_seq=4, speculative="draft")
    shared, apart = (
        count_draft(invocation, machine, draft, draft.info, replace(wishes, kv_unified=kv_unified))
        for kv_unified in (True, False)
    )
    assert shared.companions_bytes == apart.companions_bytes > 0


def test_what_was_tuned_is_used(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    from llmrun.bench.profile import Profile

    profile = Profile(3, 5, 256, "q8_0", "off", "a build", 1.2, 0.0)
    monkeypatch.setattr("llmrun.bench.profile.load_profile", lambda *_args: profile)
    path = cli.model(metadata={}, n_ctx_train=4096)
    opened(served(cli, path, kv_type="f16"), path)
    options = cli.services.opened[0][1]
    assert (options.n_threads, options.n_threads_batch, options.n_ubatch) == (3, 5, 256)
    assert (options.speculative, options.type_k) == ("off", "f16")
    assert options.n_seq_max == 4


def test_progress_is_told_and_can_stop_the_load(cli: Cli):
    path = cli.model()
    shares = []

    class Services(type(invocation_of(cli).services)):  # type: ignore[misc]
        def open_engine(self, paths: Any, options: Any, info: Any, on_progress: Any = None) -> Any:
            assert on_progress(0.5)
            return super().open_engine(paths, options, info, on_progress)

    services = Services(invocation_of(cli).environment, cli.engine)
    models = ServedModels(invocation_of(cli, services), [path])
    models.prepare()
    opened(models, path, on_progress=lambda share: shares.append(share) or True)
    assert shares == [0.5]
    assert invocation_of(cli).output.environment.stderr.getvalue() == ""


def test_closing_frees_the_model_and_remembers_its_speed_and_use(cli: Cli):
    cli.store_model()
    models = served(cli)
    found = opened(models, "tiny")
    for _ in found.engine.submit(Request((1, 2, 3), max_tokens=40)):
        pass
    store = cli.services.store()
    assert store.last_used() is not None
    found.close()
    assert cli.engine.closed
    assert SpeedLog(cli.folder / "state").path.exists()


def test_answers_in_company_say_nothing_about_speed(cli: Cli):
    cli.store_model()
    found = opened(served(cli), "tiny")
    first, second = (found.engine.submit(Request((1, 2, i), max_tokens=40)) for i in (3, 4))
    for stream in (first, second):
        for _ in stream:
            pass
    found.close()
    assert not SpeedLog(cli.folder / "state").path.exists()


def test_a_model_for_vectors_is_loaded_by_the_embedder(cli: Cli):
    asked: list[Any] = []

    class Embedder:
        n_ctx, load_s = 64, 0.5

        def close(self) -> None:
            asked.append("closed")

    class Services(type(invocation_of(cli).services)):  # type: ignore[misc]
        def open_embedder(self, *args: Any) -> Any:
            asked.append(args)
            return Embedder()

    TinyBert().write(cli.folder / "bert.gguf")
    services = Services(invocation_of(cli).environment, cli.engine)
    models = ServedModels(invocation_of(cli, services, threads=3), [str(cli.folder / "bert.gguf")])
    models.prepare()
    card = models.find("bert")
    found = models.open(card, "embed", Room())
    paths, options, info, _ = asked[0]
    assert (paths[0].name, info.kind) == ("bert.gguf", "embedder")
    assert (options.pooling, options.n_threads) == ("auto", 3)
    assert (found.n_parallel, found.n_ctx, found.engine) == (EMBED_PARALLEL, 64, None)
    assert found.memory_bytes > 0
    found.close()
    assert asked[-1] == "closed"
    with pytest.raises(UsageError, match="does not answer"):
        models.open(card, "chat", Room())
    with pytest.raises(UsageError, match="no scores"):
        models.judge(card, "rank", Room())


def test_a_model_that_is_gone_is_not_downloaded_again(cli: Cli):
    link = cli.store_model()
    models = served(cli)
    card = models.find("tiny")
    link.unlink()
    with pytest.raises(NotFoundError):
        models.open(card, "chat", Room())


def test_a_name_that_means_another_file_by_now_still_opens_the_one_that_was_listed(cli: Cli):
    link = cli.store_model()
    models = served(cli, "tiny")
    card = models.find("tiny")
    # A newer commit of the repository arrives.
    snapshot = link.parent.with_name("d" * 40)
    snapshot.mkdir()
    (snapshot / link.name).write_bytes(Path(cli.model(seed=3)).read_bytes())
    (link.parents[2] / "refs" / "main").write_text(snapshot.name)
    assert resolve_model(invocation_of(cli), "tiny").local_paths == (snapshot / link.name,)
    models.open(card, "chat", Room())
    assert models.find("tiny").digest == card.digest
    services = models._invocation.services
    assert isinstance(services, FakeServices)
    assert services.opened[0][0] == (link,)


# ---- room


def test_what_the_system_does_not_see_is_taken_off(cli: Cli):
    cli.memory = 400 * MB
    path = cli.model()
    models = served(cli, path)
    card = models.find(path)
    assert models.judge(card, "chat", Room()).runs
    crowded = models.judge(card, "chat", Room(unseen_bytes=390 * MB))
    assert not crowded.runs
    assert "memory" in str(crowded.error)
    assert crowded.quality < models.judge(card, "chat", Room()).quality
    with pytest.raises(WillNotFitError):
        models.open(card, "chat", Room(unseen_bytes=390 * MB))
    assert cli.services.opened == []


def test_what_evictions_would_free_is_added(cli: Cli):
    cli.memory = lambda: 10 * MB
    path = cli.model()
    models = served(cli, path)
    card = models.find(path)
    assert not models.judge(card, "chat", Room()).runs
    # No machine has more free than there is.
    assert not models.judge(card, "chat", Room(freed={RAM: GB})).runs
    memory = Memory(16 * GB, 10 * MB, bandwidth_bytes_s=5e10)
    cli.services.machine = lambda: Machine(Cpu(8, 8, 4), memory)  # type: ignore[method-assign]
    assert models.judge(card, "chat", Room(freed={RAM: GB})).runs


def test_more_memory_than_is_of_use_is_no_better(cli: Cli):
    path = cli.model()
    models = served(cli, path)
    card = models.find(path)
    assert (
        models.judge(card, "chat", Room()).quality
        == models.judge(card, "chat", Room(unseen_bytes=8 * GB)).quality
    )


def test_freed_memory_goes_where_it_was():
    card = Device("CUDA0", "a card", "gpu", 2 * GB, 8 * GB)
    inside = Device("MTL0", "inside", "gpu", 1 * GB, 12 * GB, shares_host_memory=True)
    machine = Machine(Cpu(8, 8, 4), Memory(16 * GB, 4 * GB), (card,))
    got = apply_room(machine, Room(1 * GB, {RAM: 2 * GB, "CUDA0": 3 * GB}))
    assert got.memory.available_bytes == 5 * GB
    assert got.devices[0].free_bytes == 5 * GB
    got = apply_room(machine, Room(9 * GB, {"CUDA0": 30 * GB}))
    assert (got.memory.available_bytes, got.devices[0].free_bytes) == (0, 8 * GB)
    unified = apply_room(
        Machine(Cpu(8, 8, 4), Memory(16 * GB, 4 * GB), (inside,)), Room(0, {"MTL0": 3 * GB})
    )
    assert (unified.memory.available_bytes, unified.devices[0].free_bytes) == (7 * GB, 4 * GB)
