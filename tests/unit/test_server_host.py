"""The models of a server: found, loaded once, shared, kept, evicted, and what clients hear."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from llmrun.errors import DamagedFileError, HubUnreachableError, WillNotFitError
from llmrun.server.host import HostOptions, ModelHost
from llmrun.server.types import ApiError
from tests.fakes.fake_opener import FakeOpener
from tests.fakes.manual_clock import EPOCH, ManualClock, turn, until

SIZES = {"a": 40, "b": 40, "c": 40}


class Server:
    """A host over `opener`, with a clock of its own."""

    def __init__(self, opener: FakeOpener, **options: Any) -> None:
        self.opener = opener
        self.clock = ManualClock()
        self.host = ModelHost(opener, HostOptions(**options), clock=self.clock)

    def ask(self, name: str, role: Any = "chat", keep_alive_s: float | None = None) -> Ask:
        return Ask(self.host, name, role, keep_alive_s)

    async def get(self, name: str, keep_alive_s: float | None = None) -> None:
        """A request from beginning to end."""
        async with self.host.use(name, keep_alive_s=keep_alive_s):
            pass

    async def fail(self, name: str, role: Any = "chat") -> ApiError:
        with pytest.raises(ApiError) as caught:
            async with self.host.use(name, role):
                pass
        return caught.value

    @property
    def loaded(self) -> set[str]:
        return {opened.card.name for opened in self.host.opened()}


class Ask:
    """A request that holds its model until it is told to leave."""

    def __init__(self, host: ModelHost, name: str, role: Any, keep_alive_s: float | None) -> None:
        self.leave = asyncio.Event()
        self.opened: Any = None
        self.task = asyncio.get_running_loop().create_task(
            self._run(host, name, role, keep_alive_s)
        )

    async def _run(self, host: ModelHost, name: str, role: Any, keep_alive_s: float | None) -> None:
        async with host.use(name, role, keep_alive_s) as opened:
            self.opened = opened
            await self.leave.wait()

    async def has_it(self) -> None:
        await until(lambda: self.opened is not None or self.task.done(), "the load")
        if self.task.done():
            self.task.result()

    async def end(self) -> None:
        self.leave.set()
        await self.task


def run(
    main: Callable[[Server], Coroutine[Any, Any, None]],
    memory: int = 100,
    sizes: dict[str, Any] | None = None,
    *,
    hub: dict[str, int] | None = None,
    **options: Any,
) -> FakeOpener:
    """Run `main` with a server, and close that: nothing may be left loaded."""
    opener = FakeOpener(memory, sizes or SIZES, hub=hub)

    async def whole() -> None:
        server = Server(opener, **options)
        try:
            await main(server)
        finally:
            await server.host.close()
        assert server.host.opened() == []

    asyncio.run(whole())
    assert opener.taken == {}
    return opener


@asynccontextmanager
async def gate(server: Server, name: str) -> Any:
    """Loads of `name` wait until the block is left."""
    event = server.opener.gates[name] = threading.Event()
    try:
        yield event
    finally:
        event.set()


# ---- loading


def test_the_first_request_loads_and_the_next_ones_share_it():
    async def main(server: Server) -> None:
        asks = [server.ask("a") for _ in range(5)]
        for ask in asks:
            await ask.has_it()
        assert len({id(ask.opened) for ask in asks}) == 1
        assert asks[0].opened.engine is server.opener.engines["a chat"]
        for ask in asks:
            await ask.end()
        await server.get("A:latest")

    assert run(main).log == ["load a chat", "close a chat"]


def test_a_loaded_model_is_not_looked_for_again():
    async def main(server: Server) -> None:
        await server.get("a")
        n_finds = server.opener.n_finds
        for _ in range(10):
            await server.get("a")
        assert server.opener.n_finds == n_finds

    run(main)


def test_one_model_loads_at_a_time():
    async def main(server: Server) -> None:
        async with gate(server, "a"):
            first, second = server.ask("a"), server.ask("b")
            await until(lambda: "load a chat" in server.opener.log)
            await turn()
            assert server.opener.log == ["load a chat"]
            doing = {card.name: card.doing for card in server.host.loading()}
            assert doing == {"a": "loading", "b": "waiting"}
            assert server.host.loading()[0].share > 0
        await first.has_it()
        await second.has_it()
        assert server.host.loading() == []
        await first.end()
        await second.end()

    run(main)


def test_roles_are_loads_of_their_own():
    async def main(server: Server) -> None:
        chat, embed = server.ask("a"), server.ask("a", "embed")
        await chat.has_it()
        await embed.has_it()
        assert chat.opened is not embed.opened
        assert sorted(card.card.name for card in server.host.loaded()) == ["a", "a"]
        await chat.end()
        await embed.end()

    assert run(main).log[:2] == ["load a chat", "load a embed"]


def test_the_places_are_the_models_streams():
    async def main(server: Server) -> None:
        ask = server.ask("a")
        await ask.has_it()
        async with ask.opened.admission.enter(), ask.opened.admission.enter():
            assert server.host.loaded()[0].n_running == 2
            with pytest.raises(ApiError) as caught:
                await ask.opened.admission.enter().__aenter__()
            assert caught.value.kind == "rate_limit"
        await ask.end()

    run(main, max_queue=0)


def test_waiting_for_a_load_has_a_bound():
    async def main(server: Server) -> None:
        async with gate(server, "a"):
            ask = server.ask("a")
            await until(lambda: "load a chat" in server.opener.log)
            await server.clock.advance(59)
            assert not ask.task.done()
            await server.clock.advance(1)
            with pytest.raises(ApiError) as caught:
                await ask.task
            error = caught.value
            assert (error.kind, error.status, error.code) == ("unavailable", 503, "model_loading")
            assert error.retry_after_s
            assert "a is being loaded" in error.message
        # It was loaded all the same, and is there for who comes again.
        await until(lambda: server.loaded == {"a"})
        await server.get("a")

    assert run(main, load_wait_s=60).log.count("load a chat") == 1


def test_so_many_wait_for_a_load_and_no_more():
    async def main(server: Server) -> None:
        async with gate(server, "a"):
            asks = [server.ask("a") for _ in range(3)]
            await until(lambda: "load a chat" in server.opener.log)
            error = await server.fail("a")
            assert (error.kind, error.status) == ("rate_limit", 429)
            assert error.retry_after_s
        for ask in asks:
            await ask.has_it()
            await ask.end()

    run(main, max_queue=3)


def test_who_goes_away_during_a_load_changes_nothing_for_the_others():
    async def main(server: Server) -> None:
        async with gate(server, "a"):
            first, second = server.ask("a"), server.ask("a")
            await until(lambda: "load a chat" in server.opener.log)
            first.task.cancel()
            await turn()
            assert first.task.cancelled()
        await second.has_it()
        assert second.opened.engine is not None
        await second.end()

    assert run(main).log == ["load a chat", "close a chat"]


def test_a_load_that_nobody_waits_for_any_more_is_kept_for_its_time():
    async def main(server: Server) -> None:
        async with gate(server, "a"):
            ask = server.ask("a")
            await until(lambda: "load a chat" in server.opener.log)
            ask.task.cancel()
            await turn()
        await until(lambda: server.loaded == {"a"})
        await server.clock.advance(299)
        assert server.loaded == {"a"}
        await server.clock.advance(1)
        assert server.loaded == set()

    run(main)


def test_a_failed_load_is_told_to_all_who_wait_and_stands_for_a_moment():
    async def main(server: Server) -> None:
        server.opener.errors["a"] = [DamagedFileError("the file of a is damaged", why="cut short")]
        async with gate(server, "a"):
            asks = [server.ask("a") for _ in range(3)]
            await until(lambda: "load a chat" in server.opener.log)
        for ask in asks:
            with pytest.raises(ApiError) as caught:
                await ask.task
            assert (caught.value.kind, caught.value.code) == ("internal", "damaged")
            assert "cut short" in caught.value.message
        assert (await server.fail("a")).code == "damaged"
        assert server.opener.log == ["load a chat"]
        await server.clock.advance(5)
        await server.get("a")

    assert run(main).log == ["load a chat", "load a chat", "close a chat"]


def test_a_defect_while_loading_is_an_error_for_the_client_and_not_a_hang():
    async def main(server: Server) -> None:
        server.opener.errors["a"] = [ZeroDivisionError("oops")]
        error = await server.fail("a")
        assert (error.kind, error.code) == ("internal", "engine")
        await server.get("b")

    run(main)


# ---- keeping


def test_an_idle_model_goes_after_its_time():
    async def main(server: Server) -> None:
        await server.get("a")
        (card,) = server.host.loaded()
        assert card.expires_s == EPOCH + server.clock.now() + 300
        await server.clock.advance(200)
        await server.get("a")
        await server.clock.advance(299)
        assert server.loaded == {"a"}
        await server.clock.advance(1)
        assert server.loaded == set()

    assert run(main).log == ["load a chat", "close a chat"]


def test_a_model_in_use_stays_however_long():
    async def main(server: Server) -> None:
        ask = server.ask("a")
        await ask.has_it()
        await server.clock.advance(10_000)
        assert server.loaded == {"a"}
        await ask.end()
        await server.clock.advance(300)
        assert server.loaded == set()

    run(main)


def test_a_request_says_how_long_its_model_stays():
    async def main(server: Server) -> None:
        await server.get("a", keep_alive_s=10)
        await server.get("b", keep_alive_s=-1)
        await server.clock.advance(10)
        assert server.loaded == {"b"}
        assert server.host.loaded()[0].expires_s is None
        await server.clock.advance(100_000)
        assert server.loaded == {"b"}
        # The next one that says nothing has the server's own time again.
        await server.get("b")
        assert server.host.loaded()[0].expires_s is not None
        for_good = server.ask("b", keep_alive_s=-1)
        await for_good.has_it()
        assert server.host.loaded()[0].expires_s is None
        await for_good.end()
        await server.get("b")
        await server.clock.advance(300)
        assert server.loaded == set()

    run(main)


def test_a_shorter_time_is_kept_though_a_longer_one_is_waited_for():
    async def main(server: Server) -> None:
        await server.get("a")
        await turn()
        await server.get("b", keep_alive_s=10)
        await server.clock.advance(10)
        assert server.loaded == {"a"}

    run(main)


def test_a_keep_alive_of_nothing_unloads_after_the_request():
    async def main(server: Server) -> None:
        first, second = server.ask("a"), server.ask("a", keep_alive_s=0)
        await first.has_it()
        await second.has_it()
        await second.end()
        assert server.loaded == {"a"}  # the first one is not done
        await first.end()
        await until(lambda: "close a chat" in server.opener.log)
        assert server.loaded == set()

    run(main)


def test_keep_alive_for_good():
    async def main(server: Server) -> None:
        await server.get("a")
        await server.clock.advance(1_000_000)
        assert server.loaded == {"a"}

    run(main, keep_alive_s=-1)


def test_unload():
    async def main(server: Server) -> None:
        assert await server.host.unload("a")  # it is not there to begin with
        await server.get("a")
        assert await server.host.unload("a")
        assert server.loaded == set()
        await server.get("a")
        embedding = server.ask("a", "embed")
        await embedding.has_it()
        await embedding.end()
        assert await server.host.unload("a")
        assert server.loaded == set()
        ask = server.ask("b")
        await ask.has_it()
        assert await server.host.unload("b")
        assert server.loaded == {"b"}
        await ask.end()
        assert server.loaded == set()
        with pytest.raises(ApiError):
            await server.host.unload("nobody")

    run(main)


def test_pinned_models_are_loaded_at_the_start_and_stay():
    async def main(server: Server) -> None:
        await server.host.start()
        assert server.loaded == {"a", "b"}
        await server.get("a", keep_alive_s=0)
        assert not await server.host.unload("a")
        await server.clock.advance(100_000)
        assert server.loaded == {"a", "b"}
        assert [card.expires_s for card in server.host.loaded()] == [None, None]
        assert (await server.fail("c")).code == "will_not_fit"
        assert server.loaded == {"a", "b"}

    run(main, pinned=("a", "b"))


def test_a_pinned_model_that_cannot_be_loaded_fails_the_start():
    async def main(server: Server) -> None:
        with pytest.raises(WillNotFitError):
            await server.host.start()
        assert server.loaded == {"a", "b"}

    run(main, pinned=("a", "b", "c"))


def test_a_broken_engine_is_loaded_anew():
    async def main(server: Server) -> None:
        first, second = server.ask("a"), server.ask("a")
        await first.has_it()
        await second.has_it()
        server.host.discard(first.opened)
        await first.end()
        third = server.ask("a")
        await third.has_it()
        assert third.opened is not first.opened
        assert server.opener.log.count("close a chat") == 0  # the second one has it still
        await second.end()
        await until(lambda: "close a chat" in server.opener.log)
        await third.end()

    run(main, memory=1000)


# ---- room


def test_the_model_unused_for_longest_is_evicted():
    async def main(server: Server) -> None:
        await server.get("a")
        await server.clock.advance(1)
        await server.get("b")
        await server.clock.advance(1)
        await server.get("a")
        await server.clock.advance(1)
        await server.get("c")
        assert server.loaded == {"a", "c"}

    log = run(main).log
    assert log[:4] == ["load a chat", "load b chat", "close b chat", "load c chat"]


def test_no_more_is_evicted_than_helps():
    async def main(server: Server) -> None:
        for name in ("s1", "s2", "s3", "big"):
            await server.get(name)
            await server.clock.advance(1)
        assert server.loaded == {"s3", "big"}

    run(main, sizes={"s1": 20, "s2": 20, "s3": 20, "big": 80})


def test_nothing_is_evicted_where_all_fit():
    async def main(server: Server) -> None:
        for name in "abc":
            await server.get(name)
        assert server.loaded == {"a", "b", "c"}

    run(main, memory=120)


def test_what_the_system_does_not_see_is_counted():
    """Half of each model's memory is reported as free by the system: three would seem to fit."""

    async def main(server: Server) -> None:
        for name in "abc":
            await server.get(name)
            await server.clock.advance(1)
        assert server.loaded == {"b", "c"}

    run(main, memory=100)


def test_a_model_that_would_run_badly_beside_another_evicts_it():
    async def main(server: Server) -> None:
        await server.get("a")
        await server.get("wide")
        assert server.loaded == {"wide"}
        assert server.opener.taken["wide chat"] == 90

    run(main, sizes={"a": 40, "wide": (50, 90)})


def test_a_model_runs_badly_beside_a_busy_one_rather_than_not_at_all():
    async def main(server: Server) -> None:
        ask = server.ask("a")
        await ask.has_it()
        await server.get("wide")
        assert server.loaded == {"a", "wide"}
        assert server.opener.taken["wide chat"] == 60
        await ask.end()

    run(main, sizes={"a": 40, "wide": (50, 90)})


def test_a_model_that_never_fits_evicts_nobody():
    async def main(server: Server) -> None:
        await server.get("a")
        error = await server.fail("giant")
        assert (error.kind, error.status, error.code) == ("unavailable", 503, "will_not_fit")
        assert error.retry_after_s is None  # asking again is of no use
        assert "giant needs 500" in error.message
        assert server.loaded == {"a"}

    run(main, sizes={"a": 40, "giant": 500})


def test_a_load_waits_for_a_busy_model_to_be_done():
    async def main(server: Server) -> None:
        busy = server.ask("a")
        await busy.has_it()
        big = server.ask("big")
        await until(lambda: server.opener.rooms)
        await turn()
        assert [card.doing for card in server.host.loading()] == ["waiting"]
        await busy.end()
        await big.has_it()
        assert server.loaded == {"big"}
        await big.end()

    run(main, sizes={"a": 40, "big": 80})


def test_a_busy_model_that_has_to_go_takes_no_new_requests():
    async def main(server: Server) -> None:
        busy = server.ask("a")
        await busy.has_it()
        big = server.ask("big")
        await until(lambda: server.host.loading())
        await until(lambda: len(server.opener.rooms) >= 3)
        await turn()
        late = server.ask("a")
        await turn()
        assert late.opened is None
        await busy.end()
        await big.has_it()
        assert server.loaded == {"big"}
        assert late.opened is None
        await big.end()
        await late.has_it()  # its turn comes too
        assert server.loaded == {"a"}
        await late.end()

    log = run(main, sizes={"a": 40, "big": 80}).log
    assert log[:5] == [
        "load a chat",
        "close a chat",
        "load big chat",
        "close big chat",
        "load a chat",
    ]


def test_waiting_for_busy_models_has_a_bound_and_they_take_requests_again():
    async def main(server: Server) -> None:
        busy = server.ask("a")
        await busy.has_it()
        big = server.ask("big")
        await until(lambda: len(server.opener.rooms) >= 3)
        await turn()
        late = server.ask("a")
        await turn()
        await server.clock.advance(60)
        with pytest.raises(ApiError) as caught:
            await big.task
        assert (caught.value.kind, caught.value.code) == ("unavailable", "model_loading")
        assert caught.value.retry_after_s
        with pytest.raises(ApiError):
            await late.task  # it has waited as long
        await until(lambda: not server.host.loading(), "the end of the load")
        again = server.ask("a")
        await again.has_it()
        assert again.opened is busy.opened
        await again.end()
        await busy.end()

    run(main, sizes={"a": 40, "big": 80}, load_wait_s=60)


def test_memory_that_is_not_free_after_all_costs_the_next_idle_model():
    async def main(server: Server) -> None:
        await server.get("a")
        await server.clock.advance(1)
        await server.get("b")
        server.opener.errors["c"] = [WillNotFitError("the allocator says no")]
        await server.get("c")
        assert server.loaded == {"b", "c"}

    assert run(main, memory=120).log[:5] == [
        "load a chat",
        "load b chat",
        "load c chat",
        "close a chat",
        "load c chat",
    ]


def test_memory_that_only_busy_models_could_give_is_a_reason_to_come_again():
    async def main(server: Server) -> None:
        busy = server.ask("a")
        await busy.has_it()
        server.opener.errors["b"] = [WillNotFitError("the allocator says no")]
        error = await server.fail("b")
        assert (error.kind, error.code) == ("unavailable", "model_loading")
        assert error.retry_after_s
        await busy.end()

    run(main)


# ---- names


def test_an_unknown_model_is_404_with_what_is_here_and_the_command_that_gets_it():
    async def main(server: Server) -> None:
        error = await server.fail("d")
        assert (error.kind, error.status) == ("not_found", 404)
        assert (error.code, error.param) == ("model_not_found", "model")
        assert "llmrun pull d" in error.message
        assert "here are: a, b, c" in error.message
        assert (await server.fail("x" * 10_000)).status == 404

    assert run(main).log == []


def test_no_name_means_the_only_model():
    async def main(server: Server) -> None:
        await server.get("")
        assert server.loaded == {"only"}

    run(main, sizes={"only": 10})


def test_no_name_means_the_only_pinned_model():
    async def main(server: Server) -> None:
        await server.host.start()
        async with server.host.use("") as opened:
            assert opened.card.name == "b"

    run(main, pinned=("b",))


def test_no_name_among_several_models_is_400_with_their_names():
    async def main(server: Server) -> None:
        error = await server.fail("")
        assert (error.kind, error.status, error.param) == ("invalid_request", 400, "model")
        assert "a, b, c" in error.message

    run(main)


def test_cards_are_those_of_the_last_look():
    async def main(server: Server) -> None:
        await server.host.start()
        assert [card.name for card in server.host.cards()] == ["a", "b", "c"]
        server.opener.sizes["d"] = (1, 1)
        assert len(server.host.cards()) == 3
        assert len(await server.host.refresh()) == len(server.host.cards()) == 4
        assert (await server.host.find("D")).name == "d"

    run(main)


# ---- downloads


def test_nothing_is_downloaded_unless_allowed():
    async def main(server: Server) -> None:
        assert (await server.fail("far")).status == 404

    assert run(main, hub={"far": 10}).log == []


def test_a_download_is_shared_and_then_loaded():
    async def main(server: Server) -> None:
        server.opener.pull_gate.clear()
        asks = [server.ask("far") for _ in range(3)]
        await until(lambda: "pull far" in server.opener.log)
        (card,) = server.host.loading()
        assert (card.name, card.doing) == ("far", "downloading")
        asks[0].task.cancel()
        await turn()
        server.opener.pull_gate.set()
        for ask in asks[1:]:
            await ask.has_it()
            await ask.end()
        assert "far" in [card.name for card in server.host.cards()]

    log = run(main, hub={"far": 10}, allow_pull=True).log
    assert log == ["pull far", "load far chat", "close far chat"]


def test_a_long_download_says_how_far_it_is():
    async def main(server: Server) -> None:
        server.opener.pull_gate.clear()
        server.opener.pull_share = 0.25
        ask = server.ask("far")
        await until(lambda: "pull far" in server.opener.log)
        await server.clock.advance(60)
        with pytest.raises(ApiError) as caught:
            await ask.task
        error = caught.value
        assert (error.kind, error.code) == ("unavailable", "model_downloading")
        assert "25%" in error.message
        assert error.retry_after_s == 60  # three times as long as it took, but no longer than that
        server.opener.pull_gate.set()
        await until(lambda: "far" in server.opener.sizes)
        await server.get("far")

    log = run(main, hub={"far": 10}, allow_pull=True, load_wait_s=60).log
    assert log.count("pull far") == 1


def test_a_download_that_fails_is_told_and_not_tried_at_once_again():
    async def main(server: Server) -> None:
        server.opener.pull_errors = [HubUnreachableError("the hub does not answer")]
        error = await server.fail("far")
        assert (error.kind, error.code) == ("unavailable", "hub_unreachable")
        assert error.retry_after_s
        await server.fail("far")
        assert server.opener.log == ["pull far"]
        await server.clock.advance(5)
        await server.get("far")

    run(main, hub={"far": 10}, allow_pull=True)


def test_a_name_that_the_hub_does_not_know_is_404():
    async def main(server: Server) -> None:
        error = await server.fail("nowhere")
        assert (error.kind, error.code) == ("not_found", "model_not_found")

    run(main, hub={"far": 10}, allow_pull=True)


def test_so_many_downloads_are_asked_for_and_no_more():
    async def main(server: Server) -> None:
        server.opener.pull_gate.clear()
        asks = [server.ask(f"far{i}") for i in range(8)]
        await until(lambda: len(server.host.loading()) == 8)
        error = await server.fail("far8")
        assert (error.kind, error.status) == ("rate_limit", 429)
        for ask in asks:
            ask.task.cancel()
        server.opener.pull_gate.set()
        await until(lambda: not server.host.loading())

    log = run(main, hub={f"far{i}": 1 for i in range(9)}, allow_pull=True).log
    assert [line for line in log if line.startswith("pull")] == [f"pull far{i}" for i in range(8)]


# ---- the end


def test_close_stops_a_load_and_frees_what_is_in_use():
    async def main(server: Server) -> None:
        using = server.ask("a")
        await using.has_it()
        async with gate(server, "b"):
            waiting = server.ask("b")
            await until(lambda: "load b chat" in server.opener.log)
            await server.host.close()
            with pytest.raises(ApiError):
                await waiting.task
        error = await server.fail("a")
        assert (error.kind, error.code) == ("unavailable", "shutting_down")
        await using.end()

    assert run(main).log == ["load a chat", "load b chat", "close a chat"]


def test_close_ends_a_load_that_waits_for_busy_models():
    async def main(server: Server) -> None:
        busy = server.ask("a")
        await busy.has_it()
        big = server.ask("big")
        await until(lambda: len(server.opener.rooms) >= 3)
        await server.host.close()
        with pytest.raises(ApiError):
            await big.task
        await busy.end()

    run(main, sizes={"a": 40, "big": 80})


def test_close_ends_a_load_that_is_just_being_judged():
    """Then it does not wait yet for a change, of which it would be told."""

    async def main(server: Server) -> None:
        opener = server.opener
        judge, go_on = opener.judge, threading.Event()
        busy = server.ask("a")
        await busy.has_it()
        n_before = len(opener.rooms)

        def judge_slowly(*args: Any) -> Any:
            judgment = judge(*args)
            if len(opener.rooms) == n_before + 2:  # with all others gone: the last before it waits
                assert go_on.wait(20)
            return judgment

        opener.judge = judge_slowly  # type: ignore[method-assign]
        big = server.ask("big")
        await until(lambda: len(opener.rooms) == n_before + 2)
        closing = asyncio.ensure_future(server.host.close())
        await turn()
        go_on.set()
        async with asyncio.timeout(20):
            await closing
        with pytest.raises(ApiError):
            await big.task
        await busy.end()

    run(main, sizes={"a": 40, "big": 80})


def test_a_loop_that_ends_in_mid_load_leaves_no_model_behind():
    opener = FakeOpener(100, SIZES)

    async def main() -> None:
        server = Server(opener)
        gate = opener.gates["a"] = threading.Event()
        ask = server.ask("a")
        await until(lambda: opener.log)
        loads = [slot.load for slot in server.host._shelf.slots.values()]
        for load in loads:
            load.cancel()
        await turn()
        with pytest.raises(ApiError):
            await ask.task
        gate.set()
        await until(lambda: "close a chat" in opener.log, "the close of what nobody has")

    asyncio.run(main())
    assert opener.taken == {}
