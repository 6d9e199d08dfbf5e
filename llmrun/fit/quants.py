"""Which quant of a model to take on a machine. Pure, but for the options' allocators."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmrun.fit.candidates import USUAL_N_CTX, Wishes, choose_n_ubatch, list_candidates
from llmrun.fit.plan import Plan, plan
from llmrun.fit.types import Allocator
from llmrun.gguf.types import ModelInfo
from llmrun.hardware.machine import Machine

_LEAST_BITS = 3.0
# Bits a weight in a label: Q4_K_M, IQ3_XXS, MXFP4, BF16, model-q8_0.gguf.
_BITS = re.compile(r"(?<![A-Za-z])(?:I?Q|TQ|MXFP|NVFP|FP|BF|F)(\d{1,2})(?!\d)", re.IGNORECASE)

# How well a plan does, worst first: see `_grade`.
_NO, _SHORT, _SLOW, _WELL = range(4)


@dataclass(frozen=True, slots=True)
class QuantOption:
    """One quant of a repository: its label, its files' bytes, its header where it was read, and who
    can measure it."""

    label: str
    n_bytes: int
    info: ModelInfo | None = None
    allocator: Allocator | None = None


@dataclass(frozen=True, slots=True)
class QuantPick:
    """The option to take, its plan, and why it is not the preferred one (or what else would fit).
    `plans` are those of all options that were looked at, in that order."""

    option: QuantOption
    plan: Plan
    reasons: tuple[str, ...]
    plans: tuple[tuple[QuantOption, Plan], ...]

    @property
    def runs(self) -> bool:
        return self.plan.runs


def choose_quant(
    machine: Machine,
    options: Sequence[QuantOption],
    wishes: Wishes | None = None,
    *,
    preferred: str,
    like: ModelInfo,
) -> QuantPick:
    """The quant to take where none was named. `preferred` is the label of the one that is taken
    where it does well (the first option where none has it); `like` is the header of any of them.

    A larger one is never taken unasked. A plan does well when the whole model is on the GPU (in RAM
    where there is no GPU), or at least half of its layers are, with a context that is not below the
    usual one. In this order, the largest first within each step:

    1. the preferred quant, or a smaller one, that does well;
    2. the same on the CPU for more than half of the layers, or for all;
    3. the same with a short context, or tight;
    4. quants of less than about 3 bits, which answer noticeably worse, in the order of 1 to 3;
    5. the preferred quant, though nothing runs.

    Raises ValueError without options, and what `plan` raises.
    """
    if not options:
        raise ValueError("no quants to choose from")
    wishes = wishes or Wishes()
    wanted = next((option for option in options if option.label == preferred), options[0])
    smaller = [option for option in options if option.n_bytes < wanted.n_bytes]
    smaller.sort(key=lambda option: -option.n_bytes)
    good = [wanted, *(option for option in smaller if _bits(option, like) >= _LEAST_BITS)]
    poor = [option for option in smaller if _bits(option, like) < _LEAST_BITS]
    judge = _Judge(machine, wishes, like)
    for group in (good, poor):
        for grade in (_WELL, _SLOW, _SHORT):
            for option in group:
                if judge.grade(option) == grade:
                    reasons = judge.explain(wanted, option)
                    if option is wanted and grade == _WELL:
                        reasons = judge.name_larger(wanted, options)
                    return QuantPick(option, judge.plan(option), reasons, judge.plans)
    return QuantPick(wanted, judge.plan(wanted), ("no quant of it runs here",), judge.plans)


def derive_info(like: ModelInfo, n_bytes: int, label: str | None = None) -> ModelInfo:
    """`like` as it would be in files of `n_bytes`: the same architecture, so the same KV cache and
    scratch memory, and every tensor larger or smaller in proportion."""
    n_data = max(1, like.n_bytes - like.header.data_offset)
    n_wanted = max(0, n_bytes - like.header.data_offset)
    tensors = tuple(
        replace(tensor, n_bytes=-(-tensor.n_bytes * n_wanted // n_data))
        for tensor in like.header.tensors
    )
    return replace(
        like,
        quant=label or like.quant,
        n_bytes=n_bytes,
        tensor_bytes=like.tensor_bytes * n_wanted // n_data,
        quant_mix=tuple((name, size * n_wanted // n_data) for name, size in like.quant_mix),
        header=replace(like.header, tensors=tensors),
    )


class _Judge:
    """Plans options, each once."""

    def __init__(self, machine: Machine, wishes: Wishes, like: ModelInfo) -> None:
        self._machine = machine
        self._wishes = wishes
        self._like = like
        self._found: dict[int, tuple[QuantOption, Plan]] = {}

    @property
    def plans(self) -> tuple[tuple[QuantOption, Plan], ...]:
        return tuple(self._found.values())

    def info(self, option: QuantOption) -> ModelInfo:
        return option.info or derive_info(self._like, option.n_bytes, option.label)

    def plan(self, option: QuantOption) -> Plan:
        if id(option) not in self._found:
            made = plan(self._machine, self.info(option), self._wishes, allocator=option.allocator)
            self._found[id(option)] = (option, made)
        return self._found[id(option)][1]

    def grade(self, option: QuantOption) -> int:
        made = self.plan(option)
        if not made.runs:
            return _NO
        if made.verdict == "tight" or made.n_ctx < self._usual_n_ctx(option):
            return _SHORT
        return _WELL if made.verdict == "fits" or _is_half_on_gpu(made) else _SLOW

    def _usual_n_ctx(self, option: QuantOption) -> int:
        info = self.info(option)
        n_ubatch = choose_n_ubatch(info, self._wishes)
        return min(USUAL_N_CTX, list_candidates(info, self._wishes, n_ubatch)[0].n_ctx)

    def explain(self, wanted: QuantOption, taken: QuantOption) -> tuple[str, ...]:
        """Why `wanted` was not taken."""
        if taken is wanted:
            return ()
        made = self.plan(wanted)
        placement = made.placement
        if made.verdict == "no":
            what = "does not run here"
            if self._wishes.n_ctx is not None:
                what += f" with a context of {self._wishes.n_ctx}"
        elif made.verdict == "tight":
            what = "fits only without a margin"
        elif made.n_ctx < self._usual_n_ctx(wanted):
            what = f"leaves room for a context of {made.n_ctx} only"
        elif made.verdict == "cpu_only":
            what = "runs on the CPU only"
        else:
            n_layers = len(placement.layer_devices) + 1
            n_left = n_layers - placement.n_on_gpu
            what = f"leaves {n_left} of {n_layers} layers on the CPU"
        return (f"{taken.label} instead of {wanted.label}, which {what}",)

    def name_larger(self, wanted: QuantOption, options: Sequence[QuantOption]) -> tuple[str, ...]:
        """The largest of the larger quants that does as well."""
        larger = [option for option in options if option.n_bytes > wanted.n_bytes]
        quality = self.plan(wanted).quality
        for option in sorted(larger, key=lambda option: -option.n_bytes):
            if self.grade(option) == _WELL and self.plan(option).quality >= quality:
                return (f"{option.label} would fit as well",)
        return ()


def _is_half_on_gpu(made: Plan) -> bool:
    return 2 * made.placement.n_on_gpu >= len(made.placement.layer_devices) + 1


def _bits(option: QuantOption, like: ModelInfo) -> float:
    """Bits a weight, by the label, else by the size."""
    match = _BITS.search(option.label)
    if match is not None:
        return float(match[1])
    return option.n_bytes * 8 / like.n_params if like.n_params else _LEAST_BITS
