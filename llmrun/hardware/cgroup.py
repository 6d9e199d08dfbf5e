"""Limits that Linux control groups, versions 1 and 2, put on this process.

A limit of any ancestor binds, so all are read, from the process's own group up to the mount point.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmrun.hardware.sources import Probe, parse_fields, parse_int


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """`limit_bytes` and what is left of it for this process, in the group at `path`."""

    path: str
    limit_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class _Mount:
    """A mounted hierarchy: the group at its `root` is seen at `point`."""

    point: str
    root: str


def find_memory_limits(probe: Probe) -> tuple[MemoryLimit, ...]:
    """Every memory limit on this process, in no special order. What version 1 writes for "no limit"
    is among them: a number near 2**63, more than any machine has."""
    limits = []
    for folder in _folders(probe, None):
        bounds = [probe.read_int(f"{folder}/memory.{name}") for name in ("max", "high")]
        known = [bound for bound in bounds if bound is not None]
        if known:
            limits.append(
                _limit(probe, folder, min(known), usage="memory.current", file_key="inactive_file")
            )
    for folder in _folders(probe, "memory"):
        bound = probe.read_int(f"{folder}/memory.limit_in_bytes")
        if bound is not None:
            limits.append(
                _limit(
                    probe,
                    folder,
                    bound,
                    usage="memory.usage_in_bytes",
                    file_key="total_inactive_file",
                )
            )
    return tuple(limits)


def find_cpu_quota(probe: Probe) -> float | None:
    """The smallest quota on this process in cores; None without one."""
    quotas = []
    for folder in _folders(probe, None):
        words = (probe.read(f"{folder}/cpu.max") or "").split()
        if len(words) == 2:
            quotas.append((parse_int(words[0]), parse_int(words[1])))
    for folder in _folders(probe, "cpu"):
        quota = probe.read_int(f"{folder}/cpu.cfs_quota_us")  # "-1" is no quota: not a count
        quotas.append((quota, probe.read_int(f"{folder}/cpu.cfs_period_us")))
    cores = [quota / period for quota, period in quotas if quota and period]
    return min(cores, default=None)


def _limit(probe: Probe, folder: str, limit: int, *, usage: str, file_key: str) -> MemoryLimit:
    """Inactive file pages are counted as used but are given back before the limit is felt."""
    used = probe.read_int(f"{folder}/{usage}") or 0
    stat = parse_fields(probe.read(f"{folder}/memory.stat") or "", " ")
    reclaimable = stat.get(file_key, stat.get("inactive_file", 0))
    held = max(0, used - min(reclaimable, used))
    return MemoryLimit(folder, limit, max(0, limit - held))


def _folders(probe: Probe, controller: str | None) -> Iterator[str]:
    """The folders of this process's group and its ancestors; `controller` None is version 2."""
    path = _group_path(probe, controller)
    if path is None:
        return
    mount = _find_mount(probe, controller)
    # In a container without a cgroup namespace the path is the host's and the mount shows only the
    # part below `root`; a path that leaves the namespace starts with "/..".
    root = mount.root.rstrip("/")
    is_below = path == root or path.startswith(root + "/")
    parts = [part for part in path[len(root) :].split("/") if part] if is_below else []
    if ".." in parts:
        parts = []
    for n_parts in range(len(parts), -1, -1):
        yield "/".join([mount.point, *parts[:n_parts]])


def _group_path(probe: Probe, controller: str | None) -> str | None:
    """This process's group as /proc/self/cgroup has it: lines of `id:controllers:path`."""
    for line in (probe.read("/proc/self/cgroup") or "").splitlines():
        fields = line.split(":", 2)
        if len(fields) != 3:
            continue
        number, controllers, path = fields
        if controller is None:
            if number == "0" and not controllers:
                return path
        elif controller in controllers.split(","):
            return path
    return None


def _find_mount(probe: Probe, controller: str | None) -> _Mount:
    """Where the hierarchy is mounted, by /proc/self/mountinfo (see proc_pid_mountinfo(5)):
    `… root point options … - type source super_options`."""
    for line in (probe.read("/proc/self/mountinfo") or "").splitlines():
        left, found, right = line.partition(" - ")
        head, tail = left.split(), right.split()
        if not found or len(head) < 5 or len(tail) < 3:
            continue
        is_v2 = controller is None and tail[0] == "cgroup2"
        is_v1 = controller is not None and tail[0] == "cgroup" and controller in tail[2].split(",")
        if is_v2 or is_v1:
            return _Mount(point=head[4], root=head[3])
    return _Mount("/sys/fs/cgroup" if controller is None else f"/sys/fs/cgroup/{controller}", "/")
