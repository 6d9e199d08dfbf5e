"""From a list of file names to models: which quants there are, which is meant, what belongs to it.

Pure. The rules are those users know from llama.cpp's `-hf`, made exact: a tag is compared as a
whole, never as a part of a longer one, so `Q4_K` is not `Q4_K_M` and `Q4_K_M` is `UD-Q4_K_M` only
where no plain one exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmrun.catalog.entries import CatalogEntry
from llmrun.catalog.keys import model_key
from llmrun.gguf.naming import quant_of, role_of, shard_of
from llmrun.hub.types import RemoteFile

# Bits a weight of common types, as llama.cpp prints them for a llama-shaped model; for "nearest"
# only, so a rounded figure is enough.
_BITS = {
    "IQ1_S": 1.6, "IQ1_M": 1.8, "TQ1_0": 1.7, "TQ2_0": 2.1, "IQ2_XXS": 2.1, "IQ2_XS": 2.3,
    "IQ2_S": 2.5, "IQ2_M": 2.7, "Q2_K": 3.0, "Q2_K_S": 2.8, "Q2_K_L": 3.1, "Q2_K_XL": 3.1,
    "IQ3_XXS": 3.1, "IQ3_XS": 3.3, "IQ3_S": 3.4, "IQ3_M": 3.7, "Q3_K_S": 3.5, "Q3_K_M": 3.9,
    "Q3_K": 3.9, "Q3_K_L": 4.3, "Q3_K_XL": 4.0, "IQ4_XS": 4.3, "IQ4_NL": 4.5, "Q4_0": 4.5,
    "Q4_1": 5.0, "Q4_K_S": 4.6, "Q4_K_M": 4.9, "Q4_K": 4.9, "Q4_K_L": 5.0, "Q4_K_XL": 5.0,
    "MXFP4": 4.3, "MXFP4_MOE": 4.4, "NVFP4": 4.5, "Q5_0": 5.5, "Q5_1": 6.0, "Q5_K_S": 5.5,
    "Q5_K_M": 5.7, "Q5_K": 5.7, "Q5_K_L": 5.8, "Q5_K_XL": 5.8, "Q6_K": 6.6, "Q6_K_L": 6.7,
    "Q6_K_XL": 7.0, "Q8_0": 8.5, "Q8_K_XL": 9.5, "F16": 16.0, "BF16": 16.0, "F32": 32.0,
}  # fmt: skip
_TARGET_BITS = _BITS["Q4_K_M"]

DEFAULT_QUANTS = ("Q4_K_M", "UD-Q4_K_M", "Q4_K_XL", "UD-Q4_K_XL", "Q4_K_L", "Q8_0")
"""What is taken without a tag where the catalog says nothing, best first."""


@dataclass(frozen=True, slots=True)
class QuantChoice:
    """One model to choose: a quant of a repository, all of its shards in order.

    `quant` is None when the name tells none. `n_shards` is how many parts the names promise;
    `complete` is False when some of them are not in the list.
    """

    quant: str | None
    n_bytes: int
    files: tuple[RemoteFile, ...]
    n_shards: int = 1

    @property
    def complete(self) -> bool:
        return len(self.files) == self.n_shards

    @property
    def path(self) -> str:
        """The file that llama.cpp is given: the only one, or the first shard."""
        return self.files[0].path

    @property
    def label(self) -> str:
        """What a user types as the tag: the quant, or the file's name where it tells none."""
        return self.quant or self.path

    @property
    def missing(self) -> tuple[int, ...]:
        """Numbers of the shards that are not in the list."""
        present = {shard.number for f in self.files if (shard := shard_of(f.path)) is not None}
        return tuple(n for n in range(1, self.n_shards + 1) if n not in present)


def list_choices(files: Iterable[RemoteFile]) -> tuple[QuantChoice, ...]:
    """Every model among `files`, smallest first; projectors, drafters and imatrices are none."""
    groups: dict[tuple[str, int], dict[int, RemoteFile]] = {}
    for file in files:
        if role_of(file.path) != "model":
            continue
        shard = shard_of(file.path)
        if shard is None:
            groups.setdefault((file.path, 0), {})[1] = file
        else:
            # Two files that claim one number: the first stays, as in any listing.
            groups.setdefault((shard.prefix, shard.count), {}).setdefault(shard.number, file)
    choices = []
    for (_, count), parts in groups.items():
        ordered = tuple(parts[number] for number in sorted(parts))
        choices.append(
            QuantChoice(
                quant=quant_of(ordered[0].path),
                n_bytes=sum(file.n_bytes for file in ordered),
                files=ordered,
                n_shards=count or 1,
            )
        )
    return tuple(sorted(choices, key=lambda choice: (choice.n_bytes, choice.path)))


def normal_quant(tag: str) -> str:
    """A quant tag in the form that is compared: `q4-k-m` -> `Q4_K_M`, `fp16` -> `F16`."""
    quant = tag.strip().upper().replace("-", "_").replace("UD_", "UD-", 1).removeprefix("I1_")
    return quant.replace("FP16", "F16").replace("FP32", "F32")


def match_tag(
    choices: Sequence[QuantChoice], tag: str, entry: CatalogEntry | None = None
) -> QuantChoice | None:
    """The model that `tag` names, or None.

    In this order: an exact file name or path (the right case first, then any; `.gguf` may be left
    out; any shard names its model), the same quant, the quant's `UD-` twin. Where several files
    have the quant, the best by `_rank` is taken.
    """
    for fold in (str, str.lower):
        for choice in choices:
            if any(fold(tag) in map(fold, _names_of(file.path)) for file in choice.files):
                return choice
    quant = normal_quant(tag)
    for wanted in (quant, f"UD-{quant}"):
        same = [c for c in choices if c.quant is not None and normal_quant(c.quant) == wanted]
        if same:
            return min(same, key=lambda choice: _rank(choice, entry))
    return None


def _names_of(path: str) -> tuple[str, ...]:
    """What may be typed for a file: its path or base name, with `.gguf` or without."""
    base = path.rpartition("/")[2]
    return tuple(name for full in (path, base) for name in (full, full[: -len(".gguf")]))


def pick_default(
    choices: Sequence[QuantChoice], entry: CatalogEntry | None = None
) -> QuantChoice | None:
    """The model to take when no tag was given; None only when there is nothing to take.

    The catalog's file, the catalog's quant, then `DEFAULT_QUANTS`, then the quant nearest to
    Q4_K_M in bits a weight (the larger one at equal distance), then the smallest file.
    """
    complete = [choice for choice in choices if choice.complete] or list(choices)
    if entry is not None:
        for wanted in (entry.file, entry.quant):
            found = match_tag(complete, wanted, entry) if wanted else None
            if found is not None:
                return found
    for quant in DEFAULT_QUANTS:
        same = [c for c in complete if c.quant is not None and normal_quant(c.quant) == quant]
        if same:
            return min(same, key=lambda choice: _rank(choice, entry))
    known = [choice for choice in complete if bits_of(choice.quant) is not None]
    if known:
        return min(
            known,
            key=lambda c: (abs((bits_of(c.quant) or 0) - _TARGET_BITS), -(bits_of(c.quant) or 0)),
        )
    return min(complete, key=lambda choice: (choice.n_bytes, choice.path), default=None)


def bits_of(quant: str | None) -> float | None:
    """About how many bits a weight has in `quant`; None when it is not known."""
    if quant is None:
        return None
    return _BITS.get(normal_quant(quant).removeprefix("UD-"))


def _rank(choice: QuantChoice, entry: CatalogEntry | None) -> tuple[bool, bool, int, bool, str]:
    """Order among files of one quant: complete, the entry's model, near the root, in one piece."""
    other = entry is not None and entry.file is not None
    if entry is not None and entry.file is not None:
        other = model_key(choice.path) != model_key(entry.file)
    return (
        not choice.complete,
        other,
        choice.path.count("/"),
        choice.n_shards > 1,
        choice.path,
    )


def pick_projector(
    files: Iterable[RemoteFile], model: QuantChoice, entry: CatalogEntry | None = None
) -> RemoteFile | None:
    """The projector that goes with `model` (see `_pick_sibling`)."""
    named = entry.projector.file if entry is not None and entry.projector is not None else None
    return _pick_sibling([f for f in files if role_of(f.path) == "projector"], model, named)


def pick_drafter(
    files: Iterable[RemoteFile], model: QuantChoice, entry: CatalogEntry | None = None
) -> RemoteFile | None:
    """The drafter that goes with `model` (see `_pick_sibling`)."""
    named = entry.drafter.file if entry is not None and entry.drafter is not None else None
    drafters = [f for f in files if role_of(f.path) == "drafter"]
    return _pick_sibling(drafters, model, named, drafter=True)


def _pick_sibling(
    candidates: Sequence[RemoteFile],
    model: QuantChoice,
    named: str | None,
    *,
    drafter: bool = False,
) -> RemoteFile | None:
    """The file the catalog names, else llama.cpp's choice among siblings.

    Its rule: the folder must be the model's or one above it; the deeper folder first, then a name
    that carries the model's own tag, then the smallest difference in bits, then listing order.
    Drafters may also lie in a folder of their own kind (`MTP/`) below one of these.
    """
    if named is not None:
        for file in candidates:
            if file.path.lower() == named.lower():
                return file
    home = _folders(model.path)
    ranked = []
    for order, file in enumerate(candidates):
        folders = _folders(file.path)
        if drafter and folders and folders[-1].lower() in ("mtp", "eagle3", "dflash", "dspark"):
            # Ranked behind the files that lie in the folder itself.
            folders, depth = folders[:-1], len(folders) - 1.5
        else:
            depth = float(len(folders))
        if home[: len(folders)] != folders:
            continue
        quant = quant_of(file.path)
        same = quant is not None and model.quant is not None and quant == model.quant
        distance = abs((bits_of(quant) or 16.0) - (bits_of(model.quant) or 4.0))
        ranked.append((-depth, not same, distance, order, file))
    return min(ranked, key=lambda item: item[:4])[4] if ranked else None


def _folders(path: str) -> list[str]:
    return path.split("/")[:-1]
