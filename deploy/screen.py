"""What `quire status` and `quire top` draw: lines of text from the admin API's JSON. Pure: the width and the height are arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .page_cells import cells

MAP_ROWS = 4
BAR_WIDTH = 24


class Glyphs(NamedTuple):
    """One character for each state of a page."""

    active: str
    shared: str
    cached: str
    moving: str
    free: str

    def of(self, state: str) -> str:
        """The character for a byte of a page map (`cluster.admin.AdminPort.page_maps`)."""
        return {"a": self.active, "s": self.shared, "c": self.cached, "r": self.moving, "m": self.moving}.get(state, self.free)

    def legend(self) -> str:
        """What they mean."""
        return "  ".join(f"{character} {name}" for name, character in self._asdict().items())


BLOCKS = Glyphs("█", "▓", "▒", "◆", "·")
ASCII = Glyphs("#", "S", "+", "r", ".")


def glyphs_for(encoding: str | None) -> Glyphs:
    """Blocks where the output can show them."""
    try:
        "".join(BLOCKS).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return BLOCKS


def status_lines(status: Mapping[str, Any], glyphs: Glyphs) -> list[str]:
    """`quire status` for people."""
    ingresses = ", ".join(f"{ingress['id']} (pid {ingress['pid']})" for ingress in status["ingresses"])
    lines = [f"controller  pid {status['controller']['pid']}", f"ingresses   {ingresses or 'none'}", ""]
    rows = [
        (
            replica["id"],
            replica["state"],
            replica["model"] or "-",
            ", ".join(f"{rank['rank']}: pid {rank['pid']} on {rank['node']}" for rank in replica["ranks"]) or "-",
            _bar(replica["pages"], glyphs),
            str(replica["running"]),
            str(replica["waiting"]),
        )
        for replica in status["replicas"]
    ]
    lines += table(("REPLICA", "STATE", "MODEL", "RANKS", "PAGES", "RUNNING", "WAITING"), rows)
    return [*lines, "", *_requests(status["requests"])]


def top_lines(top: Mapping[str, Any], rates: Mapping[str, tuple[float, float]] | None, size: tuple[int, int], glyphs: Glyphs) -> list[str]:
    """One frame of `quire top`.

    Args:
        top: what `/admin/top` answers.
        rates: replica -> prompt and output tokens a second; None before there were two looks.
        size: columns and rows that there are; rows of 0 mean no end.
    """
    width, height = size
    both = [sum(rate[i] for rate in rates.values()) for i in (0, 1)] if rates is not None else None
    speed = f"{both[0]:.0f} prompt, {both[1]:.0f} output tokens/s" if both else "-"
    queue = top["queue"]
    states = ", ".join(f"{replica['id']} {replica['state']}" for replica in top["replicas"] if replica["state"] != "ready")
    lines = [
        f"{len(top['requests'])} requests   {queue['requests']} queued ({queue['tokens']} tokens)   {speed}",
        f"{len(top['replicas'])} replicas{' (' + states + ')' if states else ''}, {len(top['ingresses'])} ingresses   {glyphs.legend()}",
        "",
    ]
    for replica in top["replicas"]:
        lines.append(_replica_line(replica, None if rates is None else rates.get(replica["id"], (0.0, 0.0))))
        lines += page_map(top["page_maps"].get(replica["id"], ""), width, glyphs)
    lines += ["", *_requests(top["requests"])]
    cut = [line[:width] for line in lines]
    if height and len(cut) > height:
        cut = [*cut[: height - 1], f"... {len(cut) - height + 1} more lines"[:width]]
    return cut


def page_map(states: str, width: int, glyphs: Glyphs, rows: int = MAP_ROWS) -> list[str]:
    """The pages of one replica in page order, at most `rows` lines of `width`: so many pages to a cell as that takes."""
    drawn = "".join(map(glyphs.of, cells(states, max(width, 1) * rows)))
    return [drawn[start : start + max(width, 1)] for start in range(0, len(drawn), max(width, 1))]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as what stands in them. What a terminal would obey is taken out."""
    lines = [tuple("".join(c if c.isprintable() else "?" for c in cell) for cell in row) for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _replica_line(replica: Mapping[str, Any], rate: tuple[float, float] | None) -> str:
    pages = replica["pages"]
    speed = f"   {rate[0]:.0f} + {rate[1]:.0f} tokens/s" if rate is not None else ""
    used = f"{pages['active']} active, {pages['cached']} cached, {pages['free']} free of {pages['total']} pages{_host(pages)}"
    return f"{replica['id']}  {replica['state']}   {replica['running']} running, {replica['waiting']} waiting   {used}{speed}"


def _requests(requests: Sequence[Mapping[str, Any]]) -> list[str]:
    if not requests:
        return ["no requests"]
    rows = [
        (r["id"], r["replica"] or "-", r["tenant"] or "-", r["state"], str(r["prompt_tokens"]), str(r["output_tokens"])) for r in requests
    ]
    return table(("REQUEST", "REPLICA", "TENANT", "STATE", "PROMPT", "OUTPUT"), rows)


def _bar(pages: Mapping[str, int], glyphs: Glyphs) -> str:
    total = pages["total"]
    if not total:
        return "-"
    active = round(BAR_WIDTH * pages["active"] / total)
    cached = min(round(BAR_WIDTH * pages["cached"] / total), BAR_WIDTH - active)
    bar = glyphs.active * active + glyphs.cached * cached + glyphs.free * (BAR_WIDTH - active - cached)
    return f"{bar} {pages['active']} active, {pages['cached']} cached of {total}{_host(pages)}"


def _host(pages: Mapping[str, int]) -> str:
    return f" + {pages['host']} host" if pages["host"] else ""
