"""`cli.serve_models.ServedModels` over the folders of a `tests.fakes.cli.Cli`."""

from __future__ import annotations

import io
from typing import Any

from llmrun.cli.options import Invocation
from llmrun.cli.serve_models import ServedModels
from llmrun.config import Environment, Settings, Source
from llmrun.ui.output import Output
from tests.fakes.cli import Cli, FakeServices


def invocation_of(cli: Cli, services: FakeServices | None = None, **settings: Any) -> Invocation:
    """What `llmrun serve` would get; `settings` count as given on the command line."""
    folder = cli.folder
    environment = Environment(
        io.StringIO(),
        io.StringIO(),
        io.StringIO(),
        cli.environ,
        folder / "config",
        folder / "state",
        folder / "data",
        folder / "cache",
    )
    services = services or FakeServices(
        environment, cli.engine, cli.memory, cli.catalog, cli.devices, cli.hub, cli.allocator
    )
    services.environment = environment
    cli.services = services
    sources = {key: Source("flag", f"--{key}") for key in settings}
    return Invocation(
        environment,
        services,
        Settings(**settings, sources=sources),
        Output(environment, command="serve"),
    )


def served(cli: Cli, *names: str, **options: Any) -> ServedModels:
    """The models that a server started with these words would have. `allow_pull` and `n_parallel`
    are the server's; other options are settings."""
    own = {key: options.pop(key) for key in ("allow_pull", "n_parallel") if key in options}
    models = ServedModels(invocation_of(cli, **options), names, **own)
    models.prepare()
    return models
