"""A process with the real server and the small application: `python -m tests.fakes.server_process
PORT DRAIN_S [FAULT]`. What happens is printed, a line each; the exit code is the server's."""

from __future__ import annotations

import asyncio
import select
import sys
import threading

from llmrun.server.guard import GuardOptions
from llmrun.server.lifecycle import ServeOptions, ServerState, serve
from llmrun.server.limits import GuardMiddleware
from tests.fakes.raw_http import TinyApp, encode_error


def main(port: str, drain_s: str, fault: str = "") -> int:
    state = ServerState()

    def say(*words: object) -> None:
        print(*words, flush=True)

    async def start() -> None:
        if fault == "loads-forever":
            await asyncio.Event().wait()
        if fault == "writes-forever":
            threading.Thread(target=_write, daemon=True).start()
            # Nobody reads it: once it is full, the stream belongs to the thread for good.
            while select.select([], [sys.stderr], [], 0)[1]:
                await asyncio.sleep(0.001)

    async def stop() -> None:
        say("stop", state.phase)
        if fault == "stops-never":
            await asyncio.to_thread(threading.Event().wait)

    def abort() -> None:
        say("abort")
        if fault == "aborts-never":
            threading.Event().wait()

    return serve(
        GuardMiddleware(TinyApp(), GuardOptions(), encode_error, state),
        ServeOptions(port=int(port), drain_s=float(drain_s), stop_s=1.0, abort_s=0.2),
        state,
        on_listen=lambda url: say("listen", url, state.phase),
        on_start=start,
        on_ready=lambda url: say("ready", url, state.phase),
        on_drain=lambda n: say("drain", n, state.phase),
        on_stop=stop,
        on_abort=abort,
    )


def _write() -> None:
    while True:
        print("x" * 1000, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
