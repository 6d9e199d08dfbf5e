"""Writes docs/gemma-4-memory.md: what every Gemma 4 model needs, beside the published figures.

    python scripts/gemma4_memory.py --write     # asks llama.cpp's allocator, writes the file
    python scripts/gemma4_memory.py --formula   # the closed form, to stdout

The models are headers in full size without weights (tests/fakes/model_shapes.py), so nothing is
downloaded; published figures come from the catalog. Takes a few seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmrun.catalog.entries import CatalogEntry
from llmrun.catalog.load import load_catalog
from llmrun.fit.exact import ChildAllocator
from llmrun.fit.formula import estimate
from llmrun.fit.types import GIB, Estimate, Setup
from tests.fakes.model_shapes import build_shape, shape_info

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gemma-4-memory.md"
GB = 1_000_000_000
CONTEXTS = (8192, 32768, 131072)
QUANTS = {"q4_k_m": "Q4_K_M", "q8_0": "Q8_0", "f16": "F16"}


@dataclass(frozen=True)
class Model:
    """`shape` and `entry` are its names in model_shapes and in the catalog."""

    title: str
    shape: str
    entry: str


MODELS = (
    Model("E2B", "gemma-4-e2b", "gemma-4-e2b"),
    Model("E4B", "gemma-4-e4b", "gemma-4-e4b"),
    Model("12B", "gemma-4-12b", "gemma-4-12b"),
    Model("26B A4B", "gemma-4-26b-a4b", "gemma-4-26b"),
    Model("31B", "gemma-4-31b", "gemma-4-31b"),
)


@dataclass(frozen=True)
class Need:
    """Bytes of one model, quant and context. `input_bytes` of the weights never leave RAM."""

    model: Model
    quant: str
    n_ctx: int
    weights_bytes: int
    input_bytes: int
    lazy_bytes: int
    kv_bytes: int
    compute_bytes: int
    overhead_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.overhead_bytes

    @property
    def gpu_bytes(self) -> int:
        return self.total_bytes - self.input_bytes - self.overhead_bytes


def compute_needs(*, exact: bool) -> list[Need]:
    """All models, quants and contexts. Raises RuntimeError when the allocator was wanted and did
    not answer."""
    needs = []
    setups = [Setup(n_ctx) for n_ctx in CONTEXTS]
    for model in MODELS:
        for quant in QUANTS:
            info = shape_info(model.shape, quant)
            estimates = [estimate(info, setup) for setup in setups]
            measured = list(_measure(model, quant, setups)) if exact else [None] * len(setups)
            for n_ctx, found, buffers in zip(CONTEXTS, estimates, measured, strict=True):
                weights, kv, compute = buffers or _parts(found)
                needs.append(
                    Need(
                        model=model,
                        quant=quant,
                        n_ctx=n_ctx,
                        weights_bytes=weights,
                        input_bytes=found.input_bytes,
                        lazy_bytes=found.lazy_bytes,
                        kv_bytes=kv,
                        compute_bytes=compute,
                        overhead_bytes=found.overhead_bytes,
                    )
                )
    return needs


def _measure(model: Model, quant: str, setups: list[Setup]) -> Iterator[tuple[int, int, int]]:
    header, n_bytes = build_shape(model.shape, quant)
    allocator = ChildAllocator.of_headers([(f"{model.shape}.gguf", header, n_bytes)])
    for measurement in allocator.measure(setups):
        if measurement is None:
            raise RuntimeError(f"llama.cpp's allocator does not answer: {allocator.problem}")
        yield measurement.weights_bytes, measurement.kv_bytes, measurement.compute_bytes


def _parts(found: Estimate) -> tuple[int, int, int]:
    return found.weights_bytes, found.kv_bytes, found.compute_bytes


def render(needs: list[Need], *, exact: bool) -> str:
    """The page. Every line but this one and those of tables is the same for any figures."""
    source = "llama.cpp's own allocator" if exact else "llmrun's closed form"
    return "\n".join(
        [
            _INTRODUCTION,
            f"Weights, cache and scratch were told by {source} for headers in full size with the",
            "usual mix of tensor types; a real file differs by up to 3 % between uploaders. The",
            "program's part is an estimate.",
            "",
            *(line for model in MODELS for line in _model_table(model, needs)),
            *_comparison(needs),
            _CLOSING,
        ]
    )


_INTRODUCTION = """\
# What Gemma 4 needs

Made by `python scripts/gemma4_memory.py --write`; do not edit by hand.

Memory to load and run each Gemma 4 model in llmrun: text only, one conversation, KV cache in
f16, FlashAttention, 512 tokens a step. GB are 10^9 bytes, GiB 2^30; the parts are in GB.

- **weights**: all tensors as loaded, with the second copy of the embedding that llama.cpp
  makes for the output (in RAM a mapped file shares it).
- **KV cache**: sliding-window layers keep 1,024 (E2B, E4B) or 1,536 cells whatever the
  context, so it grows far slower than in a plain model.
- **scratch**: the compute buffer of a step. **program**: Python, libraries, vocabulary, output
  rows.
- **on a GPU**: with all layers there. The embedding tables, of which a step reads a few rows,
  stay in RAM with the program. Leave 1 GiB beside it for the driver and other programs.
"""


def _model_table(model: Model, needs: list[Need]) -> Iterator[str]:
    yield f"## Gemma 4 {model.title}"
    yield ""
    yield (
        "| quant | context | weights | KV cache | scratch | program "
        "| **total GB** | total GiB | on a GPU, GiB | then in RAM, GiB |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for need in needs:
        if need.model is model:
            parts = (need.weights_bytes, need.kv_bytes, need.compute_bytes, need.overhead_bytes)
            cells = [f"{n / GB:.2f}" for n in parts]
            mark = " (a)" if need.lazy_bytes else ""
            yield (
                f"| {QUANTS[need.quant]}{mark} | {need.n_ctx // 1024}k | {' | '.join(cells)} "
                f"| **{need.total_bytes / GB:.2f}** | {need.total_bytes / GIB:.2f} "
                f"| {need.gpu_bytes / GIB:.2f} "
                f"| {(need.input_bytes + need.overhead_bytes) / GIB:.2f} |"
            )
    lazy = next((n.lazy_bytes for n in needs if n.model is model and n.lazy_bytes), 0)
    if lazy:
        yield ""
        yield (
            f"(a) {lazy / GB:.2f} GB of it are the per-layer embeddings, which llama.cpp maps from "
            "the file and reads row by row: they need not fit."
        )
    yield ""


# What to look up in the catalog for each quant: (source, its name for the quant).
_PUBLISHED = {
    "q4_k_m": (("google", "Q4_0"), ("google-april", "Q4_0"), ("oflight", "Q4_K_M")),
    "q8_0": (("google", "SFP8"), ("google-april", "SFP8"), ("oflight", "Q8_0")),
    "f16": (("google", "BF16"), ("google-april", "BF16"), ("oflight", "FP16")),
}
_SOURCE_WORDS = {
    "google": "Google, Gemma docs: approximate memory",
    "google-april": "Google, Gemma docs (April",
    "oflight": "oflight",
}


_ABOUT_PUBLISHED = """\
Google's page (ai.google.dev/gemma/docs/core) gives approximate memory for Q4_0, SFP8 and BF16;
in April 2026 it gave the static weights alone. The column "Gemma 4 Hardware Requirements"
(oflight, 2026-04-03) names Q4_K_M, Q8_0 and FP16; of its table only the rows of E2B and E4B
could be read, the others are from the same site's glossary. All in GB; in brackets how far the
figure is from llmrun's total at 8k.
"""


def _comparison(needs: list[Need]) -> Iterator[str]:
    catalog = load_catalog()
    yield "## Beside the published figures"
    yield ""
    yield _ABOUT_PUBLISHED
    yield (
        "| model | quant | file | llmrun, 8k | llmrun, 32k | llmrun, 128k | Google "
        "| Google, April | column |"
    )
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|"
    for model in MODELS:
        entry = catalog.get(model.entry)
        for quant, label in QUANTS.items():
            mine = [n.total_bytes for n in needs if n.model is model and n.quant == quant]
            file_bytes = build_shape(model.shape, quant)[1]
            published = [
                _beside(entry, source, name, mine[0]) for source, name in _PUBLISHED[quant]
            ]
            cells = [f"{n / GB:.1f}" for n in (file_bytes, *mine)]
            yield f"| {model.title} | {label} | {' | '.join([*cells, *published])} |"
    yield ""


def _beside(entry: CatalogEntry | None, source: str, quant: str, mine: int) -> str:
    words = _SOURCE_WORDS[source]
    for figure in entry.memory if entry is not None else ():
        if figure.quant == quant and figure.source.startswith(words):
            return f"{figure.gb:g} ({100 * (figure.gb * GB / mine - 1):+.0f} %)"
    return "–"


_CLOSING = """\
What the published figures leave out:

- **The context.** Google's are for the weights and some room; the KV cache of the 31B takes
  1.9 GB at 8k and 12 GB at 128k in f16, half of that in q8_0. Neither source says for
  which context its figure holds.
- **Quants are not their bits.** A Q4_K_M file has about 4.9 bits a weight and Q8_0 8.5, so a
  figure for Q4_0 or SFP8 is below what those files take.
- **The output's copy of the embedding**: 0.3 GB (E2B in Q4) to 2.8 GB (31B in F16); on a
  GPU always, in RAM unless the file is mapped.
- **The per-layer embeddings of E2B and E4B** are 37 to 50 % of their weights and never need to be
  on a GPU, so these models fit on smaller cards than any total says.
- **The 26B has to be loaded whole**; only its speed is that of a small model. Its experts,
  nine tenths of it, can stay in RAM.
- **Projector and drafter**: 0.2 to 1.2 GB and up to 1 GiB of working memory for images, 0.1 to
  0.5 GB for a drafter.
- **The driver's own memory** on a GPU, 0.1 to 0.6 GB.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formula", action="store_true", help="do not ask llama.cpp")
    parser.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name}")
    options = parser.parse_args()
    exact = not options.formula
    page = render(compute_needs(exact=exact), exact=exact)
    if options.write:
        PAGE.write_text(page, encoding="utf-8")
    else:
        sys.stdout.write(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
