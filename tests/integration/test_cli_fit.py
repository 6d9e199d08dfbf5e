"""`llmrun fit` against a hub on loopback: it fetches headers, each once, and never weights."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.cli import Cli, FakeServices
from tests.fakes.gguf_builder import GgufBuilder, tiny_llama_builder
from tests.fakes.hub_session import HubSession, hub_session
from tests.fakes.loopback_hub import Content
from tests.fakes.shape_hub import header_bytes, name_hashes, shape_files

SHAPE = "gemma-4-e4b"
QUANTS = ("q3_k_m", "q4_k_m", "q8_0")
REPO, BIG, SPLIT, DENSE = (f"org/{name}-GGUF" for name in ("tall", "big", "split", "dense"))
MIB = 1 << 20


def big_header(n_tokens: int, n_merges: int) -> bytes:
    """A header with a vocabulary, in front of a megabyte of weights."""
    rng = random.Random(n_tokens)
    builder = tiny_llama_builder(n_vocab=512)
    pairs = builder.pairs
    builder.pairs = pairs[:4]
    builder.add("padding.words", ["t" * rng.randint(1, 12) + str(i) for i in range(n_tokens)])
    builder.add("padding.scores", [0.0] * n_tokens)
    builder.add("padding.merges", [f"{i} " + "m" * rng.randint(1, 9) for i in range(n_merges)])
    builder.pairs += pairs[4:]
    return builder.header()


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Content]]:
    folder = tmp_path_factory.mktemp("repos")
    big: dict[str, Content] = {}
    for quant, n in (("Q4_0", 60_000), ("Q8_0", 60_000), ("F16", 60_000)):
        path = folder / f"big-{quant}.gguf"
        path.write_bytes(big_header(n, 2 * n))
        with path.open("r+b") as file:
            file.truncate(40 * MIB)
        big[path.name] = path
    split: dict[str, Content] = {}
    for number, shard in enumerate(_shards(), 1):
        split[f"split-Q8_0-{number:05}-of-00002.gguf"] = shard.build()
    return {
        REPO: shape_files(folder, SHAPE, "tall", QUANTS),
        BIG: big,
        SPLIT: split,
        DENSE: shape_files(folder, "llama-3.1-8b", "dense", QUANTS),
    }


def _shards() -> list[GgufBuilder]:
    from tests.fakes.gguf_builder import split_builder

    return split_builder(tiny_llama_builder(file_type=7), 2)


@pytest.fixture
def session(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repos: dict[str, dict[str, Content]]
) -> Iterator[HubSession]:
    with hub_session(monkeypatch, tmp_path, repos) as opened:
        name_hashes(opened.server)
        yield opened


class RealAllocators(FakeServices):
    """A machine of the tests, and llama.cpp's own allocator in its child process."""

    def allocator_of_headers(self, headers, info, machine):  # type: ignore[no-untyped-def]
        from llmrun.fit.exact import ChildAllocator

        return ChildAllocator.of_headers(headers)


def test_only_headers_are_fetched_and_each_once(session: HubSession, tmp_path: Path) -> None:
    cli = Cli(tmp_path, hub=session.hub)
    run = cli("fit", REPO, "--json")
    assert run.code == 0, run.err
    assert {row["quant"] for row in run.data["rows"]} == {quant.upper() for quant in QUANTS}
    for quant in QUANTS:
        n_served = session.server.served[f"tall-{quant.upper()}.gguf"]
        assert header_bytes(SHAPE, quant) <= n_served <= 2 * header_bytes(SHAPE, quant)
    session.server.served.clear()
    assert cli("fit", REPO, "--json").data == run.data
    assert session.server.served == {}
    assert not list((tmp_path / "hub").rglob("*.gguf"))


def test_large_headers_are_not_all_fetched(
    session: HubSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmrun.cli.fit_models._MAX_HEADER_BYTES", 4 * MIB)
    n_header_bytes = len(big_header(60_000, 120_000))
    assert n_header_bytes > 2.5 * MIB
    run = Cli(tmp_path, hub=session.hub)("fit", f"{BIG}", "--json")
    assert run.code == 0, run.err
    (path,) = session.server.served
    assert n_header_bytes <= session.server.served[path] <= 2 * n_header_bytes
    derived = {row["quant"] for row in run.data["rows"] if row["source"] == "formula"}
    assert derived == {"Q4_0", "Q8_0", "F16"}
    assert any("derived from the header of" in note for note in run.data["notes"])


def test_a_named_quant_gets_its_own_header(
    session: HubSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmrun.cli.fit_models._MAX_HEADER_BYTES", 0)
    run = Cli(tmp_path, hub=session.hub)("fit", f"{BIG}:f16", "--json")
    assert run.code == 0 and list(session.server.served) == ["big-F16.gguf"]


def test_the_recommended_quant_is_looked_into(
    session: HubSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual quant is too large here; the smaller one that is taken instead is read as well."""
    monkeypatch.setattr("llmrun.cli.fit_models._MAX_HEADER_BYTES", 0)
    cli = Cli(tmp_path, hub=session.hub, services=RealAllocators)
    run = cli("fit", DENSE, "--machine", "cpu-16gb", "--memory", "6GB", "--json")
    rows = run.data["rows"]
    (best,) = [row for row in rows if row["recommended"]]
    assert best["quant"] == "Q3_K_M" and best["source"] == "exact"
    assert set(session.server.served) == {"dense-Q4_K_M.gguf", "dense-Q3_K_M.gguf"}
    assert {row["source"] for row in rows if row["quant"] == "Q8_0"} == {"formula"}


def test_llama_cpp_is_asked_about_a_remote_model(session: HubSession, tmp_path: Path) -> None:
    cli = Cli(tmp_path, hub=session.hub, services=RealAllocators)
    rows = cli("fit", f"{REPO}:q4_k_m", "--machine", "rtx-3060-12gb", "--json").data["rows"]
    assert {row["source"] for row in rows} == {"exact"}
    kv = {row["n_ctx"]: sum(entry["kv"] for entry in row["memory"]) for row in rows}
    # memory.md, section 4: 104, 168, 552 and 2088 MiB.
    assert {n: kv[n] // MIB for n in (4096, 8192, 32768, 131072)} == {
        4096: 104,
        8192: 168,
        32768: 552,
        131072: 2088,
    }


def test_a_child_that_fails_leaves_the_closed_form(session: HubSession, tmp_path: Path) -> None:
    class Broken(FakeServices):
        def allocator_of_headers(self, headers, info, machine):  # type: ignore[no-untyped-def]
            from llmrun.fit.exact import ChildAllocator

            return ChildAllocator.of_headers(headers, command=["/nonexistent/python"])

    run = Cli(tmp_path, hub=session.hub, services=Broken)("fit", REPO, "--json")
    assert run.code == 0 and {row["source"] for row in run.data["rows"]} == {"formula"}
    (best,) = [row for row in run.data["rows"] if row["recommended"]]
    assert any("not measured" in reason for reason in best["reasons"])


def test_shards_are_one_model(session: HubSession, tmp_path: Path) -> None:
    cli = Cli(tmp_path, hub=session.hub, services=RealAllocators)
    run = cli("fit", SPLIT, "--json")
    assert run.code == 0, run.err
    (row,) = [row for row in run.data["rows"] if row["recommended"]]
    assert row["source"] == "exact" and row["quant"] == "Q8_0"
    files = session.server.repos[SPLIT].commits.popitem()[1]
    assert row["size"] == sum(len(content) for content in files.values())


def test_a_hub_that_went_away_does_not_matter(session: HubSession, tmp_path: Path) -> None:
    cli = Cli(tmp_path, hub=session.hub)
    before = cli("fit", REPO, "--json").data
    session.server.inject("status", status=503)
    after = cli("fit", REPO, "--json")
    assert after.code == 0 and after.data["rows"] == before["rows"]
    assert any("from" in note and "cannot be reached" in note for note in after.data["notes"])


def test_a_truncated_header_on_the_hub_is_7(session: HubSession, tmp_path: Path) -> None:
    session.server.repos[SPLIT].move({"bad-Q8_0.gguf": b"GGUF" + bytes(200)})
    assert Cli(tmp_path, hub=session.hub)("fit", SPLIT).code == 7


def test_a_quant_with_a_bad_header_does_not_spoil_the_others(
    session: HubSession, tmp_path: Path
) -> None:
    files = dict(session.server.repos[REPO].commits[session.server.repos[REPO].main])
    files["tall-Q6_K.gguf"] = b"GGUF" + bytes(2000)
    session.server.repos[REPO].move(files)
    run = Cli(tmp_path, hub=session.hub)("fit", REPO, "--json")
    assert run.code == 0 and any("Q6_K" in note for note in run.data["notes"])
    assert sum(row["recommended"] for row in run.data["rows"]) == 1
