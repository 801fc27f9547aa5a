"""The documents as a reader sees them: headings, links, fenced blocks and what each block is marked with.

A block of shell or Python carries a mark, an HTML comment on the line above its fence, which GitHub does not show:

    <!-- run -->                          test_documented_commands_live.py runs it, in the order of the page
    <!-- run: serve -->                   the same: one command that serves until the blocks after it have run
    <!-- run by tests/x/test_y.py -->     the tests of that file run it, or the same with smaller numbers
    <!-- not run: needs a GPU -->         nobody runs it, for that reason; its words are checked all the same
    <!-- output -->                       above a block without a language: what the block before prints, numbers aside
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "helm" / "README.md"]
SHELL = ("sh", "bash", "console")
_FENCE = re.compile(r"^(\s*)```(\S*)\s*$")
_MARK = re.compile(r"^\s*<!-- ((?:not )?run\b.*?|output) -->\s*$")
_LINK = re.compile(r"\[[^\]\[]*(?:\[[^\]]*\][^\]\[]*)?\]\(([^()\s]+)\)")
_BEFORE = re.compile(r"[A-Za-z_]+=|(export|until|do|done|!|\$)$")
_HEREDOC = re.compile(r"<<-?\s*'?(\w+)'?([^\n]*)\n.*?\n\1(?=\n|$)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: where its first line is, its language, its text, and its mark (empty: it has none)."""

    page: str
    line: int
    language: str
    text: str
    mark: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """The words of each command of a shell block, without redirections and settings of variables before it."""
        # A newline ends a command, and shlex drops it together with a comment: so a semicolon stands behind it, and is taken out of quotes.
        text = _HEREDOC.sub(r"\2", self.text).replace("\\\n", " ").replace("\n", "\n;")
        lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
        lexer.wordchars += "$,@[]%:+!{}^"
        command: list[str] = []
        is_target = False
        for word in lexer:
            if is_target:
                is_target = False
            elif set(word) <= set("<>"):
                is_target = True
            elif set(word) <= set("();|&"):
                if command:
                    yield command
                command = []
            elif command or not _BEFORE.match(word):
                command.append(word.replace("\n;", "\n"))


@dataclass(frozen=True)
class Page:
    """One file in Markdown."""

    path: Path

    @property
    def name(self) -> str:
        return os.path.relpath(self.path, ROOT)

    @cached_property
    def _split(self) -> tuple[list[str], list[Block]]:
        """Its lines outside of fences, and its blocks."""
        prose: list[str] = []
        blocks: list[Block] = []
        inside: list[str] | None = None
        language, mark, begin = "", "", 0
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            fence = _FENCE.match(line)
            if inside is None and fence:
                found = _MARK.match(prose[-1]) if prose else None
                inside, language, mark, begin = [], fence[2], found[1] if found else "", number + 1
            elif inside is not None and fence:
                blocks.append(Block(self.name, begin, language, "\n".join(inside) + "\n", mark))
                inside = None
                prose.append("")
            elif inside is not None:
                inside.append(line)
            else:
                prose.append(line)
        if inside is not None:
            raise ValueError(f"{self.name}:{begin}: the block has no end")
        return prose, blocks

    @property
    def blocks(self) -> list[Block]:
        return self._split[1]

    @cached_property
    def prose(self) -> str:
        return "\n".join(self._split[0])

    @cached_property
    def inline(self) -> list[str]:
        """What stands between single backticks."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    @cached_property
    def links(self) -> list[str]:
        """Targets of links and images."""
        return _LINK.findall(re.sub(r"`[^`\n]*`", "code", self.prose))

    @cached_property
    def anchors(self) -> set[str]:
        """Of its headings, by GitHub's rules."""
        found: set[str] = set()
        for line in self._split[0]:
            if heading := re.match(r"^#{1,6} (.*?)\s*#*$", line):
                text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
                anchor = base = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
                count = 0
                while anchor in found:
                    count += 1
                    anchor = f"{base}-{count}"
                found.add(anchor)
        return found


PAGES = [Page(path) for path in PATHS]
BLOCKS = [block for page in PAGES for block in page.blocks]
