"""What `llmrun fit` advises, and what it says where a model, a quant or the hub cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmrun.cli import acquire as acquire_module
from llmrun.errors import HubUnreachableError
from llmrun.fit.published import published_need
from tests.fakes.cli import GB, Cli, SilentAllocator
from tests.fakes.header_hub import HeaderHub

QUANTS = ("q2_k", "q4_k_m", "q8_0")


class Ignorant(SilentAllocator):
    """Says what llama.cpp does of a model that is newer than itself."""

    problem = "llama.cpp cannot read this model: unknown model architecture: 'llama'"


class NoHub:
    offline = False

    def listing(self, repo: str, revision: str = "main") -> None:
        raise HubUnreachableError("the hub cannot be reached")


def tall(folder: Path, shape: str = "llama-3.1-8b", **more) -> Cli:
    return Cli(folder, hub=HeaderHub(shape, QUANTS), **more)  # type: ignore[arg-type]


def without_hub(folder: Path) -> Cli:
    return Cli(folder, hub=NoHub(), memory=64 * GB)  # type: ignore[arg-type]


# ---- advice


def test_an_asked_context_is_in_the_command(tmp_path: Path) -> None:
    cli = tall(tmp_path)
    last = cli("fit", cli.hub.repo, "--ctx", "16384").out.splitlines()[-1]
    assert last == f"try: llmrun chat {cli.hub.repo}:Q4_K_M --ctx 16384"
    assert cli("fit", cli.hub.repo).out.splitlines()[-1].endswith(":Q4_K_M")


def test_no_context_is_advised_beyond_the_models_own(tmp_path: Path) -> None:
    cli = tall(tmp_path, memory=64 * GB)
    run = cli("fit", f"{cli.hub.repo}:q4_k_m", "--ctx", "10000000")
    assert run.out.splitlines()[-1].endswith("--ctx 131072")


def test_a_tight_row_that_takes_less_is_explained(tmp_path: Path) -> None:
    cli = tall(tmp_path, shape="gemma-4-e4b")
    run = cli("fit", cli.hub.repo, "--memory", "5GiB", "--json")
    tight = [row for row in run.data["rows"] if row["verdict"] == "tight"]
    assert tight and not any(row["settings"]["use_repack"] for row in tight)
    assert any("mapped file" in note for note in run.data["notes"])
    roomy = cli("fit", cli.hub.repo, "--memory", "64GiB", "--json")
    assert not any("mapped file" in note for note in roomy.data["notes"])


def test_an_empty_ranking_says_so(tmp_path: Path) -> None:
    run = tall(tmp_path)("fit", "--memory", "2MiB", "--json")
    assert "nothing in the catalog runs there" in run.data["notes"]
    assert not any(row["recommended"] for row in run.data["models"])


def test_a_quant_is_refused_with_the_context_that_was_asked(tmp_path: Path) -> None:
    cli = tall(tmp_path, shape="gemma-4-e4b")
    run = cli("fit", cli.hub.repo, "--memory", "5.6GiB", "--ctx", "131072", "--json")
    (best,) = [row for row in run.data["rows"] if row["recommended"]]
    assert "which does not run here with a context of 131072" in best["reasons"][0]


@pytest.mark.parametrize("width", ["80", "60", "44"])
def test_no_line_of_prose_is_wider_than_the_terminal(tmp_path: Path, width: str) -> None:
    cli = tall(tmp_path)
    cli.environ["COLUMNS"] = width
    run = cli("fit", cli.hub.repo, "--machine", "two-gpus", tty=True)
    lines = run.out.split("\ntry: ")[0].splitlines()
    plain = [line for line in lines if "\x1b" not in line]
    assert any("on two-gpus" in line for line in plain)
    assert all(len(line) <= int(width) for line in plain)


def test_pull_and_fit_give_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = tall(tmp_path)

    def fetch(invocation, resolved, events, projector, progress=None) -> tuple[Path, ...]:
        return tuple(cli.hub.write(tmp_path, file.path) for file in resolved.files)

    monkeypatch.setattr(acquire_module, "fetch", fetch)
    pulled = cli("pull", cli.hub.repo, "--json").data["models"][0]["fit"]
    fit = cli("fit", cli.hub.repo, "--json").data
    (best,) = [row for row in fit["rows"] if row["recommended"]]
    (memory,) = best["memory"]
    parts = sum(memory[part] for part in ("weights", "kv", "compute", "overhead"))
    assert (parts, memory["free"]) == (pulled["needed_bytes"], pulled["available_bytes"])
    for key in ("n_ctx", "verdict", "tok_s", "source"):
        assert best[key] == pulled[key], key


# ---- a model that this build does not know


def test_a_model_that_the_build_does_not_know_is_not_advised(tmp_path: Path) -> None:
    cli = tall(tmp_path, allocator=Ignorant())
    run = cli("fit", cli.hub.repo)
    assert run.code == 0 and "it does not know the architecture 'llama'" in run.out
    assert run.out.splitlines()[-1] == "try: pip install --upgrade llama-cpp-python"


def test_nor_is_it_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[object] = []

    def fetch(*arguments: object) -> tuple[Path, ...]:
        fetched.extend(arguments)
        raise HubUnreachableError("the hub cannot be reached")

    monkeypatch.setattr(acquire_module, "fetch", fetch)
    cli = tall(tmp_path, allocator=Ignorant())
    for verb in (["pull", cli.hub.repo], ["run", cli.hub.repo, "hi"]):
        run = cli(*verb)
        assert run.code == 1 and "it does not know the architecture 'llama'" in run.err
        assert run.err.splitlines()[-1] == "try: pip install --upgrade llama-cpp-python"
    assert not fetched
    run = cli("pull", cli.hub.repo, "--force")
    assert run.code == 6 and fetched
    assert "estimated, not measured: llama.cpp cannot read this model" in run.err


# ---- quants that are named


def test_two_quants_are_one_too_many(tmp_path: Path) -> None:
    cli = tall(tmp_path)
    run = cli("fit", f"{cli.hub.repo}:q8_0", "--quant", "q4_k_m")
    assert run.code == 2 and "two quants are named: q8_0 and q4_k_m" in run.err
    assert cli("fit", f"{cli.hub.repo}:q8_0", "--quant", "Q8_0").code == 0


@pytest.mark.parametrize("arguments", [["gemma-4-e4b:q8_0"], ["gemma-4-e4b", "--quant", "Q8_0"]])
def test_a_named_quant_is_kept_without_a_hub(tmp_path: Path, arguments: list[str]) -> None:
    run = without_hub(tmp_path)("fit", *arguments, "--json")
    assert run.code == 0
    assert [row["quant"] for row in run.data["rows"]] == ["Q8_0"]
    assert run.data["advice"] == "try: llmrun pull gemma-4-e4b:q8_0"


def test_a_quant_that_the_catalog_does_not_know_needs_the_hub(tmp_path: Path) -> None:
    run = without_hub(tmp_path)("fit", "gemma-4-e4b", "--quant", "q5_0", "--json")
    assert run.code == 6
    assert json.loads(run.out)["errors"][0]["code"] == "hub_unreachable"


def test_no_published_figure_is_below_the_file(tmp_path: Path) -> None:
    cli = without_hub(tmp_path)
    run = cli("fit", "gemma-4-26b", "--json")
    rows = run.data["rows"]
    needs = [sum(m["weights"] + m["kv"] + m["overhead"] for m in row["memory"]) for row in rows]
    assert all(need > row["size"] for need, row in zip(needs, rows, strict=True))
    entry = cli.services.catalog().get("gemma-4-26b")
    figure = published_need(entry, entry.quant)
    assert figure is not None and figure.total_bytes < entry.n_bytes
