"""The console in a real browser beside a real cluster: it shows what happens and does what its buttons say."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from browser import Page, chromium
from streams import stream
from tiny_server import Serve, save_tiny_model

TOKEN = "sesame"
# `at` maps a stream to the replica that its row names, `state` a replica to what its card says, `active` a replica to the number of pixels
# of its page map in the colour of active pages.
LOOK = """
window.rows = (body) => [...document.querySelectorAll(`#${body} tr`)];
window.at = () => Object.fromEntries(rows("requests").map((row) => [row.dataset.request, row.cells[1].textContent]));
window.card = (replica) => document.querySelector(`[data-replica="${replica}"]`);
window.state = (replica) => card(replica).querySelector(".state").textContent;
window.active = (replica) => {
  const canvas = card(replica).querySelector("canvas"), all = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const colour = getComputedStyle(document.querySelector('#legend [data-state="a"]')).backgroundColor.match(/[0-9]+/g).map(Number);
  let found = 0;
  for (let i = 0; i < all.length; i += 4) found += colour.every((part, j) => all[i + j] === part);
  return found;
};
"""


def sign_in(page: Page, admin: str) -> None:
    """The page asks for the token, refuses a wrong one, and shows nothing before it has the right one."""
    page.open(admin + "/console")
    page.wait("document.querySelector('#sign-in') && !document.querySelector('#sign-in').hidden")
    page.type("#token", "open")
    page.wait("document.querySelector('#token-error').textContent.includes('not the server')")
    assert page.run("document.querySelector('#console').hidden && document.querySelectorAll('[data-replica]').length === 0")
    page.type("#token", TOKEN)
    page.wait("!document.querySelector('#console').hidden && document.querySelectorAll('[data-replica]').length === 3")
    page.run(LOOK)


def confirm(page: Page, button: str) -> None:
    """Presses it, and says yes."""
    page.click(button)
    page.click("#confirm[open] #confirm-yes")


@pytest.mark.ray
@pytest.mark.slow
def test_an_operator_moves_a_stream_and_drains_a_replica(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--kv-pages", "1024", "--replicas", "3", "--no-rebalance", "--admin-token", TOKEN]
    with chromium(tmp_path / "profile") as page, Serve(tmp_path / "log", *flags) as server:
        server.wait_ready()
        admin = server.admin
        assert httpx.get(admin + "/admin/console").status_code == 401
        page.size(1280, 900)
        sign_in(page, admin)
        with stream(server.url, "one: " + "abc " * 60), stream(server.url, "two: " + "abc " * 60):
            places = page.wait("Object.keys(at()).length === 2 && at()")
            request, source = next(iter(places.items()))
            empty = next(name for name in ("replica-0", "replica-1", "replica-2") if name not in places.values())
            page.wait(f"active('{source}') > 0")
            assert page.run(f"active('{empty}')") == 0

            page.run(f"document.querySelector('[data-request=\"{request}\"] select').value = '{empty}'")
            confirm(page, f'[data-request="{request}"] button')
            page.wait(f"at()['{request}'] === '{empty}' && active('{empty}') > 0")
            moved = page.wait("rows('moves').map((row) => row.innerText).find((text) => text.includes('moved'))")
            assert request in moved
            assert f"{source} → {empty}" in moved

            confirm(page, f'[data-replica="{empty}"] button')
            page.wait(f"state('{empty}') === 'drained' && active('{empty}') === 0")
            assert page.run("Object.keys(at()).length") == 2  # both go on
            assert empty not in page.run("Object.values(at())")
            confirm(page, f'[data-replica="{empty}"] button')  # which now undoes it
            page.wait(f"state('{empty}') === 'ready'")
        page.wait("!document.querySelector('#no-requests').hidden")
    assert page.problems == []
    assert admin + "/admin/console" in page.requests
    assert [url for url in page.requests if not url.startswith(admin + "/")] == []
