"""Finds, plans, loads and downloads the models of a server, with what `run` and `chat` use for
that. See `server.opener.Opener`, which this is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from llmrun.cli.acquire import Acquired, acquire, read_model_info, resolve_model, wishes_of
from llmrun.cli.judge import describe_memory, plan_on_disk, require_fit
from llmrun.cli.options import Invocation
from llmrun.cli.serve_cards import CardList, Served
from llmrun.errors import HubUnreachableError, NotFoundError, UsageError, WillNotFitError
from llmrun.server.opener import RAM, Judgment, Opened, Role, Room
from llmrun.server.types import ModelCard
from llmrun.text import escape_line

if TYPE_CHECKING:
    from llmrun.catalog.types import Resolved
    from llmrun.cli.services import Services
    from llmrun.engine.embed_shape import EmbedOptions
    from llmrun.engine.types import LoadProgress
    from llmrun.fit.plan import Plan, Wishes
    from llmrun.gguf.types import ModelInfo
    from llmrun.hardware.machine import Machine
    from llmrun.hub.types import RemoteFile

EMBED_PARALLEL = 8
"""Requests for vectors that are worked on at once: their inputs are computed in common batches."""

_KEPT_HEADERS = 4


@dataclass(frozen=True, slots=True)
class _Found:
    """A served model with its header. `invocation` sees the room that it is to be loaded into."""

    invocation: Invocation
    resolved: Resolved
    info: ModelInfo
    machine: Machine


class ServedModels:
    """Implements `server.opener.Opener`.

    `names` are those of the command line; none means all of the store. With `allow_pull` the store
    is served beside them, and `pull` works. `n_parallel` None chooses.
    """

    def __init__(
        self,
        invocation: Invocation,
        names: Sequence[str] = (),
        *,
        allow_pull: bool = False,
        n_parallel: int | None = None,
    ) -> None:
        self._invocation = invocation
        self._names = tuple(names)
        self._allow_pull = allow_pull
        self._n_parallel = n_parallel
        self._list = CardList(invocation, names, all_stored=allow_pull)
        # Planning reads headers and may start processes: one at a time is enough.
        self._planning = threading.Lock()
        self._infos: dict[object, ModelInfo] = {}

    def prepare(self) -> tuple[str, ...]:
        """Get the named models onto this machine, as `run` does; the names of their cards, which
        are to be pinned. Before anything else. Raises every LlmrunError on the way."""
        found = []
        for name in self._names:
            resolved = resolve_model(self._invocation, name)
            if not resolved.is_on_disk:
                acquired = acquire(
                    self._invocation, name, wishes_of(self._invocation.settings), draft=False
                )
                resolved = replace(acquired.resolved, local_paths=acquired.paths)
            found.append(resolved)
        return self._list.resolve_named(found)

    # ---- finding

    def cards(self) -> list[ModelCard]:
        return [served.card for served in self._list.served()]

    def find(self, name: str) -> ModelCard:
        return self._list.find(name).card

    # ---- planning

    def judge(self, card: ModelCard, role: Role, room: Room) -> Judgment:
        """By the closed form: within a tenth is near enough to decide who has to go."""
        from llmrun.fit.plan import plan

        found = self._look_at(card, room)
        if role == "chat":
            wishes = self._count_draft(found, wishes_of(found.invocation.settings))
        else:
            wishes = _embed_wishes(found, role)[1]
        made = plan(found.machine, found.info, wishes)
        try:
            require_fit(found.invocation, found.resolved, found.info, made, wishes, found.machine)
        except WillNotFitError as error:
            return Judgment((0,), error)
        runs, n_ctx, companions, where, *_ = made.quality
        return Judgment((max(1, runs), n_ctx, companions, where))

    def _look_at(self, card: ModelCard, room: Room) -> _Found:
        """The model behind a card. Raises NotFoundError when it is gone meanwhile."""
        served = self._served(card)
        invocation = _with_room(self._invocation, room)
        resolved = _resolve(invocation, served)
        info = self._read_info(invocation, resolved)
        return _Found(invocation, resolved, info, invocation.services.machine())

    def _read_info(self, invocation: Invocation, resolved: Resolved) -> ModelInfo:
        """The header, kept for a while: several plans of one model follow each other."""
        try:
            status = [path.stat() for path in resolved.local_paths]
        except OSError as error:
            raise NotFoundError(f"{resolved.reference} is gone", why=error.strerror) from error
        key = (resolved.local_paths, *((each.st_size, each.st_mtime_ns) for each in status))
        info = self._infos.get(key) or read_model_info(invocation, resolved)
        assert info is not None
        if key not in self._infos and len(self._infos) >= _KEPT_HEADERS:
            self._infos.clear()
        self._infos[key] = info
        return info

    def _served(self, card: ModelCard) -> Served:
        for served in self._list.served():
            if served.card.name == card.name:
                return served
        raise NotFoundError(f"{card.name} is not on this machine any more", hint="llmrun list")

    def _count_draft(self, found: _Found, wishes: Wishes) -> Wishes:
        from llmrun.cli.draft import count_draft, find_draft

        draft = find_draft(found.invocation, found.resolved)
        if draft is None:
            return wishes
        return count_draft(found.invocation, found.machine, draft, found.info, wishes)

    # ---- loading

    def open(
        self, card: ModelCard, role: Role, room: Room, on_progress: LoadProgress | None = None
    ) -> Opened:
        with self._planning:
            found = self._look_at(card, room)
            if role != "chat":
                return self._open_embedder(card, role, found, on_progress)
            _require_chat(card, found.info)
            acquired = self._plan_chat(found)
        return self._open_engine(card, found, acquired, on_progress)

    def _plan_chat(self, found: _Found) -> Acquired:
        """As for `chat`, with what `bench --tune` found, for as many streams as are wanted or fit.
        Raises WillNotFitError."""
        from llmrun.cli.draft import count_draft, fetch_draft, find_draft
        from llmrun.cli.open_model import with_profile
        from llmrun.fit.parallel import choose_parallel
        from llmrun.fit.plan import plan

        invocation, info, machine = found.invocation, found.info, found.machine
        paths = found.resolved.local_paths
        draft = find_draft(invocation, found.resolved)

        def count(wishes: Wishes) -> Wishes:
            if draft is None:
                return wishes
            return count_draft(invocation, machine, draft, info, wishes)

        def plan_exactly(wishes: Wishes) -> Plan:
            return plan_on_disk(invocation, machine, info, paths, count(wishes))

        wishes = wishes_of(invocation.settings)
        alone = plan_exactly(wishes)
        require_fit(invocation, found.resolved, info, alone, wishes, machine)
        acquired = with_profile(
            invocation, Acquired(found.resolved, info, alone, paths, False, count(wishes), machine)
        )
        alone = acquired.plan
        if acquired.profile is not None:
            wishes = replace(
                wishes, n_ubatch=alone.n_ubatch, type_k=alone.type_k, type_v=alone.type_v
            )
        made = choose_parallel(
            info,
            wishes,
            alone,
            lambda wishes: plan(machine, info, count(wishes)),
            n_streams=self._n_parallel,
        )
        if made is not alone:
            made = choose_parallel(info, wishes, alone, plan_exactly, n_streams=made.n_seq)
            if made.verdict in ("tight", "no") and self._n_parallel is None:
                made = alone
            require_fit(invocation, found.resolved, info, made, wishes, machine)
            made = replace(made, n_threads=alone.n_threads, n_threads_batch=alone.n_threads_batch)
        # For an attempt with less: there, streams share one cache again unless the user says no.
        if wishes.n_ctx is not None:
            wishes = replace(wishes, n_ctx=made.n_ctx)
        return replace(
            acquired,
            plan=made,
            wishes=count(replace(wishes, n_seq=made.n_seq)),
            draft_paths=fetch_draft(invocation, draft, False),
        )

    def _open_engine(
        self,
        card: ModelCard,
        found: _Found,
        acquired: Acquired,
        on_progress: LoadProgress | None,
    ) -> Opened:
        from llmrun.cli.measure import record_speed
        from llmrun.cli.open_model import load_model
        from llmrun.fit.parallel import request_limit

        invocation = found.invocation
        for reason in acquired.plan.reasons:
            invocation.output.detail(reason)
        model = load_model(invocation, acquired, on_progress or _go_on)
        acquired, plan = model.acquired, model.acquired.plan

        def close() -> None:
            model.engine.close()
            # Other models' memory is in the process's, so that says nothing about this one's.
            record_speed(self._invocation, acquired, model.engine, None)
            self._invocation.services.store().record_use(acquired.paths[0])

        return Opened(
            card=card,
            role="chat",
            n_ctx=request_limit(found.info, wishes_of(invocation.settings), plan),
            close=close,
            engine=model.engine,
            sampling=model.sampling,
            max_tokens=invocation.settings.max_tokens,
            stop=invocation.settings.stop,
            n_parallel=plan.n_seq,
            kv_unified=plan.kv_unified,
            uses=_uses(plan),
            unseen_bytes=_unseen_bytes(plan),
            load_s=model.engine.load_s,
            plan_line=describe_memory(plan),
        )

    def _open_embedder(
        self, card: ModelCard, role: Role, found: _Found, on_progress: LoadProgress | None
    ) -> Opened:
        options, wishes = _embed_wishes(found, role)
        invocation, settings = found.invocation, found.invocation.settings
        paths = found.resolved.local_paths
        plan = plan_on_disk(invocation, found.machine, found.info, paths, wishes)
        require_fit(invocation, found.resolved, found.info, plan, wishes, found.machine)
        options = replace(
            options,
            n_gpu_layers=plan.n_gpu_layers,
            n_threads=settings.threads or plan.n_threads_batch,
            type_k=plan.type_k,
            type_v=plan.type_v,
            use_mmap=plan.use_mmap,
            use_repack=plan.use_repack,
            n_cpu_moe=plan.n_cpu_moe,
            tensor_split=plan.tensor_split,
            steady_threads=settings.threads is None,
        )
        embedder = invocation.services.open_embedder(paths, options, found.info, on_progress)
        self._invocation.services.store().record_use(paths[0])
        return Opened(
            card=card,
            role=role,
            n_ctx=embedder.n_ctx,
            close=embedder.close,
            embedder=embedder,
            n_parallel=EMBED_PARALLEL,
            uses=_uses(plan),
            unseen_bytes=_unseen_bytes(plan),
            load_s=embedder.load_s,
            plan_line=describe_memory(plan),
        )

    # ---- downloading

    def pull(self, name: str, on_progress: Callable[[float], None]) -> ModelCard:
        """Whether it fits is judged as if nothing else ran, since others can be evicted for it."""
        from llmrun.catalog.names import CatalogRef, RepoRef, is_local_model, parse_reference

        name = name.strip()
        reference = parse_reference(name, exists=lambda _text: False)
        if not isinstance(reference, CatalogRef | RepoRef) or is_local_model(name):
            # A name that is a file of this machine, too, is none that a stranger may use.
            raise NotFoundError(f"no model is called '{escape_line(name[:200])}'")
        invocation = _with_all_memory(self._invocation)
        acquire(
            invocation,
            name,
            wishes_of(invocation.settings),
            draft=False,
            progress=_Share(on_progress),
        )
        return self.find(name)


def _resolve(invocation: Invocation, served: Served) -> Resolved:
    """What was listed, without the network: by its reference, and by its path where that has come
    to mean something else since. Raises NotFoundError when it is gone."""
    offline = replace(invocation, settings=replace(invocation.settings, offline=True))
    for text in (served.text, str(served.paths[0])):
        try:
            resolved = resolve_model(offline, text)
        except (NotFoundError, HubUnreachableError):
            continue
        if resolved.local_paths == served.paths:
            return resolved
    raise NotFoundError(f"{served.card.name} is not on this machine any more", hint="llmrun list")


def _go_on(_share: float) -> bool:
    return True


def _require_chat(card: ModelCard, info: ModelInfo) -> None:
    from llmrun.engine.embed_shape import embedding_kind

    kind = embedding_kind(info)
    if kind != "chat":
        what = "vectors of texts" if kind == "embedding" else "scores of pairs of texts"
        raise UsageError(f"{card.name} gives {what}, it does not answer")


def _embed_wishes(found: _Found, role: Role) -> tuple[EmbedOptions, Wishes]:
    """Raises UsageError for what the model is not made for."""
    from llmrun.engine.embed_shape import EmbedOptions, embedding_kind, shape_context

    settings, info = found.invocation.settings, found.info
    if role == "embed" and embedding_kind(info) == "reranker":
        raise UsageError(
            f"{found.resolved.reference} gives scores of pairs of texts, not vectors",
            hint="choose an embedding model",
        )
    wishes = wishes_of(settings)
    options = EmbedOptions(
        n_ctx=settings.ctx,
        pooling="rank" if role == "rank" else "auto",
        flash_attn=wishes.flash_attn,
        type_k="f16" if wishes.type_k == "auto" else wishes.type_k,
        type_v="f16" if wishes.type_v == "auto" else wishes.type_v,
    )
    shape = shape_context(info, options)
    return options, replace(
        wishes,
        n_ctx=shape.n_cells,
        n_seq=shape.n_seq_max,
        kv_unified=True,
        n_ubatch=shape.n_ubatch,
        type_k=options.type_k,
        type_v=options.type_v,
        speculative="off",
        # Every token of a batch has its row of logits, though none is computed.
        companions_bytes=4 * (info.n_vocab or 0) * shape.n_ubatch,
    )


# ---- memory


def _uses(plan: Plan) -> Mapping[str, int]:
    return {share.device: share.used_bytes for share in plan.shares}


def _unseen_bytes(plan: Plan) -> int:
    """Of the RAM: mapped weights, but for those that the CPU has copied in its own order, and the
    scratch memory, which may not have been touched."""
    ram = next((share for share in plan.shares if share.device == RAM), None)
    if ram is None:
        return 0
    mapped = ram.weights_bytes if plan.use_mmap else 0
    if plan.use_repack:
        mapped = max(0, mapped - plan.placement.repack_bytes)
    return mapped + ram.compute_bytes


class _MachineView:
    """The services with another view of the machine."""

    def __init__(self, services: Services, view: Callable[[Machine], Machine]) -> None:
        self._services = services
        self._view = view

    def __getattr__(self, name: str) -> Any:
        return getattr(self._services, name)

    def machine(self) -> Machine:
        return self._view(self._services.machine())


def _with_room(invocation: Invocation, room: Room) -> Invocation:
    """The invocation with a machine whose free memory is what `room` makes of it."""
    services = _MachineView(invocation.services, lambda machine: apply_room(machine, room))
    return replace(invocation, services=cast("Services", services))


def apply_room(machine: Machine, room: Room) -> Machine:
    """The machine with the free memory that there is to plan with. A GPU inside the processor has
    its memory in the RAM."""
    memory = machine.memory
    inside = [device.name for device in machine.devices if device.shares_host_memory]
    freed = sum(room.freed.get(name, 0) for name in (RAM, *inside))
    available = memory.available_bytes - room.unseen_bytes + freed
    devices = tuple(
        replace(
            device,
            free_bytes=min(device.total_bytes, device.free_bytes + room.freed.get(device.name, 0)),
        )
        for device in machine.devices
    )
    memory = replace(memory, available_bytes=max(0, min(memory.total_bytes, available)))
    return replace(machine, memory=memory, devices=devices)


def _with_all_memory(invocation: Invocation) -> Invocation:
    def view(machine: Machine) -> Machine:
        memory = replace(machine.memory, available_bytes=machine.memory.total_bytes)
        devices = tuple(replace(each, free_bytes=each.total_bytes) for each in machine.devices)
        return replace(machine, memory=memory, devices=devices)

    return replace(invocation, services=cast("Services", _MachineView(invocation.services, view)))


class _Share:
    """Implements `hub.types.DownloadProgress`: tells which share of the bytes is here."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._n_done = 0
        self._n_total = 0

    def begin(self, files: tuple[RemoteFile, ...], n_bytes_present: int) -> None:
        with self._lock:
            self._n_done, self._n_total = n_bytes_present, sum(file.n_bytes for file in files)

    def advance(self, path: str, n_bytes: int) -> None:
        with self._lock:
            self._n_done += n_bytes
            share = self._n_done / self._n_total if self._n_total else 0.0
        self._tell(min(1.0, max(0.0, share)))

    def finish_file(self, path: str) -> None: ...

    def note(self, message: str) -> None: ...

    def end(self) -> None: ...
