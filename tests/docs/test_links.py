"""Every link leads somewhere, and every page can be reached from the README."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from documents import PAGES, ROOT, Page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Page):
    assert [fault for link in page.links if (fault := _fault(page, link))] == []


def _fault(page: Page, link: str) -> str:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return "" if parts.scheme == "https" and "." in (parts.hostname or "") else f"{link}: is no https address"
    target = (page.path.parent / parts.path).resolve() if parts.path else page.path
    if not target.is_relative_to(ROOT) or not target.exists():
        return f"{link}: there is no such file"
    if parts.fragment and (target.suffix != ".md" or parts.fragment not in Page(target).anchors):
        return f"{link}: there is no such heading"
    return ""


def test_every_page_is_reached_from_the_readme():
    pages = {page.path: page for page in PAGES}
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        path = todo.pop()
        if path in pages and path not in seen:
            seen.add(path)
            todo += [(path.parent / urlsplit(link).path).resolve() for link in pages[path].links if "://" not in link]
    assert set(pages) == seen


def test_every_picture_is_shown():
    shown = {(page.path.parent / link).resolve() for page in PAGES for link in page.links}
    assert set((ROOT / "docs").rglob("*.png")) <= shown


def test_a_broken_link_is_found():
    page = Page(ROOT / "README.md")
    assert _fault(page, "docs/configuration.md#autoscaling") == ""
    assert _fault(page, "docs/configuration.md#autoscalin") == "docs/configuration.md#autoscalin: there is no such heading"
    assert _fault(page, "docs/configuratio.md") == "docs/configuratio.md: there is no such file"
    assert _fault(page, "../elsewhere.md") == "../elsewhere.md: there is no such file"
    assert _fault(page, "http://example.com") == "http://example.com: is no https address"


def test_anchors_are_githubs(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# A `b_c` & d-e, f!\n## [Link](x.md)\n# Twice\n# Twice\n```sh\n# no heading\n```\n")
    assert Page(path).anchors == {"a-b_c--d-e-f", "link", "twice", "twice-1"}
