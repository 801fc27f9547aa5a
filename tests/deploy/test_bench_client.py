"""The load client against a real server over a real socket."""

from __future__ import annotations

import asyncio
import socket

import pytest
from sse_peer import running_peer

from quire.deploy.load.client import LoadRun, Outcome, Sampling, body_of
from quire.deploy.load.http import HttpError, Server
from quire.deploy.load.workload import LoadRequest


@pytest.fixture
def peer():
    with running_peer() as running:
        yield running


async def load(server: Server, *requests: LoadRequest, concurrency: int = 2) -> list[Outcome]:
    heard: list[Outcome] = []
    async with asyncio.timeout(60):
        outcomes = await LoadRun(server, Sampling("tiny"), heard.append).closed(requests, concurrency)
    assert sorted(heard, key=id) == sorted(outcomes, key=id)
    return outcomes


async def test_tokens_are_counted_by_usage_and_times_are_in_order(peer):
    first, second = await load(Server(peer.url), LoadRequest("hello", 5, exact=False), LoadRequest((7, 8, 9), 2, exact=True))
    assert (first.input_tokens, first.output_tokens, first.cached_tokens, first.error) == (5, 5, 3, None)
    assert (second.input_tokens, second.output_tokens) == (3, 2)
    assert 0 < first.ttft_s < first.latency_s
    by_prompt = {str(body["prompt"]): body for body in peer.bodies}
    assert "ignore_eos" not in by_prompt["hello"]
    assert by_prompt["[7, 8, 9]"]["ignore_eos"] is True


async def test_windows_line_ends(peer):
    peer.separator = "\r\n\r\n"
    (outcome,) = await load(Server(peer.url), LoadRequest("hello", 3, exact=False))
    assert (outcome.output_tokens, outcome.error) == (3, None)


async def test_the_key_is_sent(peer):
    await load(Server(peer.url, "s3cret"), LoadRequest("hello", 1, exact=False))
    assert peer.headers[-1]["authorization"] == "Bearer s3cret"
    await load(Server(peer.url), LoadRequest("hello", 1, exact=False))
    assert "authorization" not in peer.headers[-1]


@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [
        ("429", "HTTP 429", "the queue is full"),
        ("html", "HTTP 502", "bad gateway"),
        ("cut", "stream cut", "before [DONE]"),
        ("error", "error event", "the engine died"),
        ("silent", "timeout", "nothing came for 0.3 s"),
    ],
)
async def test_failures_are_told_apart_and_do_not_stop_the_run(peer, prompt, kind, message):
    server = Server(peer.url, timeout_s=0.3 if prompt == "silent" else 60)
    outcomes = await load(server, LoadRequest(prompt, 4, exact=False), LoadRequest("fine", 4, exact=False), concurrency=1)
    assert (outcomes[0].error, outcomes[1].error) == (kind, None)
    assert message in outcomes[0].message


async def test_leaving_early_closes_the_connection(peer):
    events = Server(peer.url).events("/v1/completions", body_of(LoadRequest("hold", 4, exact=False), Sampling("tiny")))
    async with asyncio.timeout(60):
        await anext(events)
        await events.aclose()
        assert await asyncio.to_thread(peer.closed_early.wait, 30)


async def test_no_server_is_an_error_of_its_own():
    with socket.socket() as taken:  # bound but not listening: nobody else gets the port, and connecting fails
        taken.bind(("127.0.0.1", 0))
        (outcome,) = await load(Server(f"http://127.0.0.1:{taken.getsockname()[1]}"), LoadRequest("x", 1, exact=False))
    assert outcome.error == "connect"


async def test_a_closed_loop_keeps_its_concurrency(peer):
    held = [LoadRequest("hold", 1, exact=False)] * 5
    run = asyncio.ensure_future(LoadRun(Server(peer.url), Sampling("tiny"), lambda _: None).closed(held, 3))
    assert await asyncio.to_thread(peer.wait_running, 3)
    assert len(peer.bodies) == 3  # the other two wait for one of these to end
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert peer.most_running == 3


async def test_an_open_loop_does_not_wait_for_answers(peer):
    held = [LoadRequest("hold", 1, exact=False)] * 5
    load = LoadRun(Server(peer.url), Sampling("tiny"), lambda _: None)
    run = asyncio.ensure_future(load.open(held, [0.0, 0.0, 0.001, 0.002, 0.003]))
    assert await asyncio.to_thread(peer.wait_running, 5)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run


async def test_an_open_loop_sends_no_earlier_than_told(peer):
    times_s = [0.0, 0.05, 0.1]
    requests = [LoadRequest("hello", 1, exact=False)] * 3
    async with asyncio.timeout(60):
        outcomes = await LoadRun(Server(peer.url), Sampling("tiny"), lambda _: None).open(requests, times_s)
    assert all(outcome.start_s >= due_s for outcome, due_s in zip(outcomes, times_s, strict=True))


async def test_models(peer):
    assert list(await Server(peer.url).models()) == ["tiny", "other"]


async def test_another_service_is_recognised():
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        with pytest.raises(HttpError, match="is not HTTP"):
            await Server(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}").models()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:99999"])
def test_what_is_no_url(url):
    with pytest.raises(ValueError, match=r"URL|[Pp]ort"):
        Server(url)


def test_a_key_cannot_smuggle_a_header():
    with pytest.raises(ValueError, match="printable"):
        Server("http://x", "a\r\nX-Evil: 1")
