"""How much host memory this process may still take: the machine's, or the container's where that is less."""

from __future__ import annotations

import re
from pathlib import Path

_PROC, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
# (limit, in use) of a control group: version 2, and 1
_FILES = ("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")


def free_bytes(meminfo: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """Bytes that can be had without swapping.

    Args:
        meminfo: the kernel's figures for the machine.
        cgroup: directory of the process's control group, of either version; one without a limit, or none, does not count.
    """
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    if found is None:
        raise RuntimeError(f"{meminfo} does not say MemAvailable")
    free = int(found.group(1)) * 1024
    for limit_file, used_file in _FILES:
        try:
            limit, used = (cgroup / limit_file).read_text().strip(), (cgroup / used_file).read_text()
        except OSError:
            continue
        return free if limit == "max" else max(min(free, int(limit) - int(used)), 0)
    return free
