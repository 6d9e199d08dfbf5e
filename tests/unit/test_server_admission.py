"""Who is let in, who waits, who is sent away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from llmrun.server.admission import Admission
from llmrun.server.types import ApiError
from tests.fakes.manual_clock import ManualClock, turn


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


class Client:
    """A request that holds its place until it is told to leave."""

    def __init__(self, admission: Admission, log: list[str], name: str, n: int = 1) -> None:
        self.leave = asyncio.Event()
        self.is_in = False
        self._log, self._name = log, name
        self.task = asyncio.get_running_loop().create_task(self._run(admission, n))

    async def _run(self, admission: Admission, n: int) -> None:
        async with admission.enter(n):
            self.is_in = True
            self._log.append(self._name)
            await self.leave.wait()

    async def end(self) -> None:
        self.leave.set()
        await self.task


def test_first_come_first_served():
    async def main() -> None:
        log: list[str] = []
        admission = Admission(2, 8)
        clients = [Client(admission, log, str(i)) for i in range(5)]
        await turn()
        assert log == ["0", "1"]
        assert (admission.n_running, admission.n_waiting) == (2, 3)
        await clients[1].end()
        await turn()
        assert log == ["0", "1", "2"]
        for i in (0, 2, 3, 4):
            await clients[i].end()
        assert log == ["0", "1", "2", "3", "4"]
        assert (admission.n_running, admission.n_waiting) == (0, 0)

    run(main())


def test_a_full_queue_sends_away_with_a_time_to_come_again():
    async def main() -> None:
        clock = ManualClock()
        admission = Admission(1, 2, clock=clock)
        clients = [Client(admission, [], str(i)) for i in range(3)]
        await turn()
        with pytest.raises(ApiError) as caught:
            async with admission.enter():
                pass
        error = caught.value
        assert (error.kind, error.code, error.status) == ("rate_limit", "queue_full", 429)
        assert error.retry_after_s == 15.0  # three before, 5 s each as long as nothing is known
        await clock.advance(2.0)
        await clients[0].end()
        await turn()
        later = Client(admission, [], "later")
        await turn()
        with pytest.raises(ApiError) as caught:
            async with admission.enter():
                pass
        assert caught.value.retry_after_s == 6.0  # requests take 2 s
        for client in (*clients[1:], later):
            await client.end()

    run(main())


def test_no_queue_at_all():
    async def main() -> None:
        admission = Admission(1, 0)
        first = Client(admission, [], "first")
        await turn()
        with pytest.raises(ApiError):
            await admission.enter().__aenter__()
        await first.end()
        async with admission.enter():
            assert admission.n_running == 1

    run(main())


def test_who_goes_away_while_waiting_leaves_the_queue():
    async def main() -> None:
        log: list[str] = []
        admission = Admission(1, 8)
        clients = [Client(admission, log, str(i)) for i in range(3)]
        await turn()
        clients[1].task.cancel()
        await turn()
        assert admission.n_waiting == 1
        await clients[0].end()
        await turn()
        assert log == ["0", "2"]
        await clients[2].end()
        assert admission.n_running == 0

    run(main())


def test_who_goes_away_just_when_called_passes_the_place_on():
    async def main() -> None:
        log: list[str] = []
        admission = Admission(1, 8)
        first = admission.enter()
        await first.__aenter__()
        second, third = Client(admission, log, "second"), Client(admission, log, "third")
        await turn()
        await first.__aexit__(None, None, None)
        # The place is the second one's by now, who has not run since.
        assert (admission.n_running, second.is_in) == (1, False)
        second.task.cancel()
        await turn()
        assert log == ["third"]
        await third.end()
        assert (admission.n_running, admission.n_waiting) == (0, 0)

    run(main())


def test_who_goes_away_while_running_gives_the_place_back():
    async def main() -> None:
        log: list[str] = []
        admission = Admission(1, 8)
        clients = [Client(admission, log, str(i)) for i in range(2)]
        await turn()
        clients[0].task.cancel()
        await turn()
        assert log == ["0", "1"]
        await clients[1].end()

    run(main())


def test_a_request_for_several_answers_takes_several_places():
    async def main() -> None:
        log: list[str] = []
        admission = Admission(4, 8)
        small = Client(admission, log, "small")
        await turn()
        large = Client(admission, log, "large", n=4)
        behind = Client(admission, log, "behind")
        await turn()
        # Nobody passes the one that waits longest, or it might wait for ever.
        assert log == ["small"]
        await small.end()
        await turn()
        assert log == ["small", "large"]
        assert admission.n_running == 4
        await large.end()
        await turn()
        assert log == ["small", "large", "behind"]
        await behind.end()

    run(main())


def test_those_behind_a_large_request_that_goes_away_are_called():
    async def main() -> None:
        log: list[str] = []
        admission = Admission(2, 8)
        small = Client(admission, log, "small")
        await turn()
        large, behind = Client(admission, log, "large", n=2), Client(admission, log, "behind")
        await turn()
        assert log == ["small"]
        large.task.cancel()
        await turn()
        assert log == ["small", "behind"]
        await small.end()
        await behind.end()

    run(main())


def test_more_answers_than_places_take_all_of_them():
    async def main() -> None:
        admission = Admission(2, 8)
        async with admission.enter(128):
            assert admission.n_running == 2

    run(main())


def test_nobody_waits_longer_than_is_said():
    async def main() -> None:
        clock = ManualClock()
        admission = Admission(1, 8, wait_s=30, clock=clock)
        first, second = Client(admission, [], "first"), Client(admission, [], "second")
        await turn()
        await clock.advance(29)
        assert not second.task.done()
        await clock.advance(1)
        with pytest.raises(ApiError) as caught:
            await second.task
        assert (caught.value.kind, caught.value.code) == ("unavailable", "queue_timeout")
        assert caught.value.retry_after_s
        assert admission.n_waiting == 0
        await first.end()

    run(main())


def test_an_error_gives_the_place_back():
    async def main() -> None:
        admission = Admission(1, 8)
        with pytest.raises(ValueError, match="broken"):
            async with admission.enter():
                raise ValueError("broken")
        assert admission.n_running == 0

    run(main())


def test_two_hundred_clients_on_a_queue_of_64_all_hear_something():
    async def main() -> None:
        clock = ManualClock()
        admission = Admission(4, 64, clock=clock)
        n_served = n_refused = 0

        async def ask() -> None:
            nonlocal n_served, n_refused
            try:
                async with admission.enter():
                    await clock.sleep(1)
                    n_served += 1
            except ApiError as error:
                assert error.kind == "rate_limit"
                assert error.retry_after_s is not None
                n_refused += 1

        tasks = [asyncio.create_task(ask()) for _ in range(200)]
        await turn()
        for _ in range(17):
            await clock.advance(1)
        await asyncio.gather(*tasks)
        assert (n_served, n_refused) == (68, 132)
        assert (admission.n_running, admission.n_waiting) == (0, 0)

    run(main())
