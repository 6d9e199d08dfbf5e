"""The models of a server for real: loaded, used together, evicted, downloaded, as embedders."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrun.cli.serve_models import ServedModels
from llmrun.cli.services import Services
from llmrun.engine.types import FinishEvent, Request, SamplingParams
from llmrun.errors import EngineError
from llmrun.hardware.machine import Cpu, Machine, Memory
from llmrun.hub import remote
from llmrun.server.host import HostOptions, ModelHost
from llmrun.server.opener import Opened
from llmrun.server.types import ApiError
from tests.fakes.cli import GB, Cli, FakeServices, model_bytes
from tests.fakes.hub_session import HubSession, hub_session
from tests.fakes.models import smollm2_path
from tests.fakes.served import invocation_of
from tests.fakes.tiny_bert import CLS, SEP, TinyBert

MB = 10**6
GREEDY = SamplingParams(temperature=0)


class RealServices(FakeServices):
    """Real engines on a machine with `n_free` bytes of memory, of which each loaded model takes
    `n_each` that the system sees."""

    n_free = 16 * GB
    n_each = 0

    def __init__(self, cli: Cli) -> None:
        super().__init__(invocation_of(cli).environment, cli.engine, memory=cli.memory, hub=cli.hub)
        self.engines: list[Any] = []

    def machine(self) -> Machine:
        n_open = sum(not _is_closed(engine) for engine in self.engines)
        free = self.n_free - self.n_each * n_open
        memory = Memory(self.n_free, free, bandwidth_bytes_s=5e10)
        return Machine(Cpu(2, 2, 2), memory)

    def open_engine(self, *args: Any, **kwargs: Any) -> Any:
        engine = Services.open_engine(self, *args, **kwargs)
        self.engines.append(engine)
        return engine


def _is_closed(engine: Any) -> bool:
    try:
        engine.submit(Request((1,), max_tokens=0)).cancel()
    except EngineError:
        return True
    return False


def models_of(services: RealServices, cli: Cli, *names: str, **options: Any) -> ServedModels:
    own = {key: options.pop(key) for key in ("allow_pull", "n_parallel") if key in options}
    return ServedModels(invocation_of(cli, services, **options), names, **own)


def answer(opened: Opened, text: str, n: int = 12) -> list[int]:
    assert opened.engine is not None
    prompt = opened.engine.tokenizer.tokenize(text, add_special=True, parse_special=False)
    tokens: list[int] = []
    for event in opened.engine.submit(Request(tuple(prompt), GREEDY, n, ignore_eog=True)):
        if not isinstance(event, FinishEvent):
            tokens += getattr(event, "tokens", ())
    return tokens


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


def test_two_models_answer_beside_each_other_and_are_evicted_for_a_third(cli: Cli) -> None:
    """Each tiny model needs some 73 MB with all that is around it, SmolLM2 some 210 MB."""
    first, second = cli.model("first.gguf"), cli.model("second.gguf", seed=2)
    services = RealServices(cli)
    models = models_of(services, cli, first, second, str(smollm2_path()), speculative="off")
    assert models.prepare() == ("first", "second", "SmolLM2-135M-Instruct.Q4_1")
    small = "SmolLM2-135M-Instruct.Q4_1"

    async def main() -> None:
        host = ModelHost(models)
        try:
            async with host.use("first") as one, host.use("second") as two:
                assert one.n_parallel == 4
                given = [
                    asyncio.to_thread(answer, opened, "the cat") for opened in (one, two, one, two)
                ]
                tokens = await asyncio.gather(*given)
                assert tokens[0] == tokens[2] != tokens[1] == tokens[3]
                n_tiny = one.memory_bytes
            # What is left now is too little for a third beside them.
            services.n_each = n_tiny - one.unseen_bytes
            services.n_free = 2 * n_tiny + 80 * MB
            assert {opened.card.name for opened in host.opened()} == {"first", "second"}
            async with host.use(small) as third:
                assert len(await asyncio.to_thread(answer, third, "Once upon a time")) == 12
                assert small in {opened.card.name for opened in host.opened()}
                assert "first" not in {opened.card.name for opened in host.opened()}
            services.n_free = 16 * GB
            async with host.use("FIRST") as again:
                assert await asyncio.to_thread(answer, again, "the cat") == tokens[0]
        finally:
            await host.close()

    asyncio.run(main())
    assert len(services.engines) == 4
    assert all(map(_is_closed, services.engines))


def test_a_model_that_can_never_fit_evicts_nobody_and_says_so(cli: Cli) -> None:
    path = cli.model()
    services = RealServices(cli)
    models = models_of(services, cli, path, str(smollm2_path()))
    models.prepare()

    async def main() -> None:
        host = ModelHost(models)
        try:
            async with host.use("tiny-Q8_0"):
                pass
            services.n_free, services.n_each = 120 * MB, 60 * MB
            with pytest.raises(ApiError) as caught:
                async with host.use("SmolLM2-135M-Instruct.Q4_1"):
                    pass
            assert (caught.value.code, caught.value.retry_after_s) == ("will_not_fit", None)
            assert "of memory" in caught.value.message
            assert [opened.card.name for opened in host.opened()] == ["tiny-Q8_0"]
        finally:
            await host.close()

    asyncio.run(main())


@pytest.mark.parametrize("kv_unified", ["auto", "on"])
def test_streams_of_one_model_run_together(cli: Cli, kv_unified: str) -> None:
    services = RealServices(cli)
    models = models_of(
        services,
        cli,
        str(smollm2_path()),
        n_parallel=3,
        speculative="off",
        kv_unified=kv_unified,
    )
    (name,) = models.prepare()

    async def main() -> None:
        host = ModelHost(models, HostOptions(pinned=(name,)))
        await host.start()
        try:
            (opened,) = host.opened()
            assert opened.engine is not None
            assert opened.engine.counters.n_seq_max == opened.n_parallel == 3
            assert opened.n_ctx == 8192
            assert opened.engine.n_ctx == (3 * 8192 if kv_unified == "on" else 8192)
            assert opened.engine.counters.n_ctx == 3 * 8192
            assert opened.plan_line.startswith("fits")
            texts = ["One day a fox", "The sea is", "In the morning"]
            given = [asyncio.to_thread(answer, opened, text) for text in texts]
            together = await asyncio.gather(*given)
            assert [len(tokens) for tokens in together] == [12, 12, 12]
        finally:
            await host.close()

    asyncio.run(main())


def test_vectors_and_scores_are_loads_of_their_own(cli: Cli) -> None:
    TinyBert().write(cli.folder / "bert.gguf")
    TinyBert(classifier=True, pooling_type=4).write(cli.folder / "rank.gguf")
    services = RealServices(cli)
    paths = [str(cli.folder / f"{name}.gguf") for name in ("bert", "rank")]
    models = models_of(services, cli, *paths, cli.model())
    models.prepare()

    async def main() -> None:
        host = ModelHost(models)
        try:
            async with host.use("bert", "embed") as opened:
                assert opened.embedder is not None
                assert opened.engine is None
                (row,) = await asyncio.to_thread(opened.embedder.embed, [[CLS, 6, SEP]])
                assert len(row) == 32
                assert opened.n_ctx == 64
            async with host.use("rank", "rank") as opened:
                assert opened.embedder is not None
                scores = await asyncio.to_thread(opened.embedder.rank, [[CLS, 6, SEP, 7, SEP]])
                assert len(scores) == 1
            async with host.use("tiny-Q8_0", "embed") as opened:
                assert opened.embedder is not None
                (row,) = await asyncio.to_thread(opened.embedder.embed, [[1, 2, 3]])
                assert len(row) == 64
            for name, role in (("bert", "chat"), ("bert", "rank"), ("rank", "embed")):
                with pytest.raises(ApiError) as caught:
                    async with host.use(name, role):  # type: ignore[arg-type]
                        pass
                assert caught.value.kind == "invalid_request"
        finally:
            await host.close()

    asyncio.run(main())


def test_the_plan_counts_what_a_load_really_takes(cli: Cli) -> None:
    """The engine's own allocation against the planned share of the cache, for eight streams."""
    services = RealServices(cli)
    models = models_of(services, cli, str(smollm2_path()), n_parallel=8, ctx=512)
    models.prepare()
    card = models.find("SmolLM2-135M-Instruct.Q4_1")
    opened = models.open(card, "chat", _room())
    try:
        assert opened.engine is not None
        assert opened.engine.n_ctx == opened.n_ctx == 512
        assert opened.engine.counters.n_ctx == 8 * 512
        # 30 layers, 3 heads of 64 for keys and for values, two bytes each.
        n_cache = 30 * 2 * 3 * 64 * 2 * 8 * 512
        assert opened.memory_bytes > smollm2_path().stat().st_size + n_cache
        assert opened.memory_bytes < 3 * smollm2_path().stat().st_size + n_cache
    finally:
        opened.close()


def _room() -> Any:
    from llmrun.server.opener import Room

    return Room()


# ---- downloads


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubSession]:
    monkeypatch.setattr(remote, "FIRST_WINDOW_BYTES", 65536)
    repos = {"org/tiny-GGUF": {"tiny-Q8_0.gguf": model_bytes()}}
    with hub_session(monkeypatch, tmp_path / "hub", repos) as opened:
        yield opened


def test_a_model_that_is_asked_for_is_downloaded_and_answers(cli: Cli, session: HubSession) -> None:
    cli.hub = session.hub
    cli.environ["HF_HUB_CACHE"] = str(session.cache)
    services = RealServices(cli)
    services.n_free, services.n_each = GB, 0
    models = models_of(services, cli, allow_pull=True)

    async def main() -> None:
        host = ModelHost(models, HostOptions(allow_pull=True))
        await host.start()
        assert host.cards() == []
        try:
            asks = [asyncio.create_task(_first_tokens(host, "org/tiny-GGUF")) for _ in range(3)]
            tokens = await asyncio.gather(*asks)
            assert tokens[0] == tokens[1] == tokens[2]
            assert [card.name for card in host.cards()] == ["org/tiny-GGUF:Q8_0"]
            with pytest.raises(ApiError) as caught:
                await _first_tokens(host, "org/absent-GGUF")
            assert caught.value.code == "model_not_found"
        finally:
            await host.close()

    asyncio.run(main())
    assert len(services.engines) == 1


async def _first_tokens(host: ModelHost, name: str) -> list[int]:
    async with host.use(name) as opened:
        return await asyncio.to_thread(answer, opened, "the cat")


def test_what_is_not_allowed_to_be_downloaded_is_404_without_a_question_to_the_hub(
    cli: Cli, session: HubSession
) -> None:
    cli.hub = session.hub
    models = models_of(RealServices(cli), cli)

    async def main() -> None:
        host = ModelHost(models)
        with pytest.raises(ApiError) as caught:
            await _first_tokens(host, "org/tiny-GGUF")
        assert caught.value.status == 404
        assert "llmrun pull org/tiny-GGUF" in caught.value.message
        await host.close()

    asyncio.run(main())
    assert session.server.requests == []
