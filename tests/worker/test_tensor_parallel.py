"""Several ranks against one: the same tokens, and of memory each its share. A rank that dies or stops takes the replica along."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import time
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from ranks import KEY, WAIT_S, follower_process, generate, leader_process, ranks, ready_report, spawn, tiny_options, tokens
from tiny_models import SIZES, random_model
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from quire.kernels.cpu_library import library
from quire.worker.actor import ReplicaActor
from quire.worker.engine import Engine, build_engine
from quire.worker.parallel import GroupBroken, lead
from quire.worker.protocol import GenerateRequest, SamplingParams
from quire.worker.rank import RankActor
from quire.worker.rendezvous import LOOPBACK, address_of, listen
from quire.worker.text.source import ModelNotFound, resolve_model

MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),  # two KV heads: four ranks hold each twice
    "llama, one KV head": LlamaConfig(**SIZES | {"num_key_value_heads": 1}),
    "llama, tied head": LlamaConfig(**SIZES | {"num_key_value_heads": 4}, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral, sliding window": MistralConfig(**SIZES, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, tied head": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}
GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(1, 97, (n,), generator=GENERATOR).tolist() for n in (1, 9, 33)]
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=6, temperature=1.0, ignore_eos=True, logprobs=2, prompt_logprobs=1)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_every_number_of_ranks_gives_the_same_tokens(config: PretrainedConfig, tmp_path: Path) -> None:
    random_model(config).save_pretrained(tmp_path)
    found = {}
    for tp in (1, 2, 4):
        with ranks(tiny_options(tmp_path, tp)) as several:
            greedy, drawn = generate(several.engine, PROMPTS, GREEDY), generate(several.engine, PROMPTS, DRAWN)
            assert several.engine.info.tp == tp
        found[tp] = tokens(greedy), tokens(drawn), scores(drawn)
    for tp in (2, 4):
        assert found[tp][:2] == found[1][:2]
        torch.testing.assert_close(found[tp][2], found[1][2], atol=1e-4, rtol=0)
    assert all(len(t) == 10 for t in found[1][0])


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_ranks_follow_through_preemption_and_shared_pages(preemption: str, tmp_path: Path) -> None:
    random_model(MODELS["llama"]).save_pretrained(tmp_path)
    found = {}
    for tp in (1, 2):
        options = tiny_options(tmp_path, tp)
        with ranks(
            replace(options, cache=replace(options.cache, kv_pages=15, host_memory=2**20 * (preemption == "swap"), preemption=preemption))
        ) as several:  # one prompt and its output take 11
            engine = several.engine
            for i, prompt in enumerate(PROMPTS):
                params = SamplingParams(n=2, max_tokens=10, temperature=1.0, seed=i, ignore_eos=True)
                engine.submit(GenerateRequest(str(i), (tuple(prompt),), params))
            outputs: dict[tuple[str, int], list[int]] = {}
            while not engine.idle():
                for o in engine.step():
                    outputs.setdefault((o.request_id, o.choice), []).extend(o.tokens)
            assert engine.stats().preemptions[preemption] > 0
        found[tp] = outputs
    assert found[2] == found[1]
    assert {len(t) for t in found[1].values()} == {10}
    assert len(found[1]) == 6


def scores(outputs: list) -> torch.Tensor:
    """All log-probabilities that were reported, those of prompts first."""
    prompts = [lp.logprob for some in outputs for lp in some[0].prompt_logprobs or ()]
    assert len(prompts) == sum(len(p) - 1 for p in PROMPTS)
    return torch.tensor(prompts + [lp.logprob for some in outputs for o in some for lp in o.logprobs or ()])


def test_a_token_is_the_same_bits_alone_and_in_a_batch(tmp_path: Path) -> None:
    """Sums are added in the order of the ranks, wherever in the batch a token stands."""
    if library() is None:
        pytest.skip("without the compiled kernels not even one rank does that")
    random_model(MODELS["qwen3"]).save_pretrained(tmp_path)
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=1)
    with ranks(tiny_options(tmp_path, 4)) as several:
        alone = [generate(several.engine, [prompt], params)[0] for prompt in PROMPTS]
        together = generate(several.engine, PROMPTS, params)
    bits = [[lp for some in runs for o in some for lp in o.logprobs or ()] for runs in (alone, together)]
    assert bits[0] == bits[1]


@pytest.mark.parametrize("tied", [False, True])
def test_each_rank_holds_its_share(tied: bool, tmp_path: Path) -> None:
    lib = library()
    wide = 4 * (lib.panel if lib else 16)  # no padding of a packed weight hides a difference
    sizes = {"vocab_size": 4 * wide, "hidden_size": wide, "intermediate_size": 2 * wide, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = random_model(LlamaConfig(**SIZES | sizes, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    norms = sum(w.nbytes for name, w in model.named_parameters() if "norm" in name)
    held = {}
    for tp in (1, 2, 4):
        with ranks(tiny_options(tmp_path, tp)) as several:
            held[tp] = several.memory()
    whole = held[1][0]
    copied = model.get_input_embeddings().weight.nbytes if tied and lib else 0  # a packed head is a table of its own
    assert whole.weights == sum(w.nbytes for w in model.parameters()) + copied
    assert whole.pool == 64 * 4 * 2 * 3 * wide * 4  # pages, tokens, K and V, layers, elements, bytes
    for tp in (2, 4):
        assert {m.weights for m in held[tp]} == {norms + (whole.weights - norms) // tp}
        assert {m.pool for m in held[tp]} == {whole.pool // tp}


def test_ranks_that_share_a_kv_head_hold_it_each(tmp_path: Path) -> None:
    random_model(MODELS["llama"]).save_pretrained(tmp_path)  # two KV heads
    with ranks(tiny_options(tmp_path, 1)) as one, ranks(tiny_options(tmp_path, 4)) as four:
        assert {m.pool for m in four.memory()} == {one.memory()[0].pool // 2}


def test_the_rank_that_can_hold_least_says_how_many_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model(MODELS["llama"]).save_pretrained(tmp_path)
    fits = iter((50, 40, 60, 70))
    monkeypatch.setattr("quire.worker.build._num_pages", lambda *args: next(fits))
    beside = iter((9, 8, 7, 10))
    monkeypatch.setattr("quire.worker.build._num_host_pages", lambda *args: next(beside))
    with ranks(tiny_options(tmp_path, 4)) as four:
        assert four.engine.info.pool_tokens == 40 * 4
        assert len({m.pool for m in four.memory()}) == 1


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({}, 3, "tp: 4 attention heads do not divide by 3 ranks"),
        ({"intermediate_size": 50}, 4, "tp: 50 elements of the MLP do not divide by 4 ranks"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 48}, 4, "tp: 6 KV heads divide by 4 ranks neither"),
        ({"vocab_size": 5}, 4, "tp: a vocabulary of 5 leaves nothing to the last of 4 ranks"),
    ],
)
def test_what_does_not_divide_is_refused_by_name(
    changes: dict[str, int], tp: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model(LlamaConfig(**SIZES | changes, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path)
    monkeypatch.setattr("quire.worker.weights.SafetensorsCheckpoint.tensor", None)  # no weight is read
    with pytest.raises(ValueError, match=message), ranks(tiny_options(tmp_path, tp)):
        pass


def test_ranks_without_a_group_are_refused_by_name(tmp_path: Path) -> None:
    random_model(MODELS["llama"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tp: 2 ranks are asked for, and there are 1"):
        build_engine(tiny_options(tmp_path, 2), KEY)


def test_int8_shards_too(tmp_path: Path) -> None:
    if library() is None:
        pytest.skip("there is no C compiler here")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 4}  # shards are whole groups of 64 inputs
    random_model(LlamaConfig(**SIZES | sizes)).save_pretrained(tmp_path)
    found = []
    for tp in (1, 2):
        with ranks(tiny_options(tmp_path, tp, quantize="int8")) as several:
            found.append(tokens(generate(several.engine, PROMPTS, GREEDY)))
    assert found[0] == found[1]


@pytest.mark.slow
def test_smollm2_on_three_ranks() -> None:
    try:
        resolve_model("smollm2")
    except ModelNotFound as missing:
        pytest.skip(str(missing))
    texts = ["The capital of France is", "def fibonacci(n):", "Once upon a time, in a small village", "Water boils at"]
    from quire.worker.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_model("smollm2"))
    prompts = [tokenizer.encode(text) for text in texts]
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    found, held = {}, {}
    for tp in (1, 3):
        with ranks(tiny_options("smollm2", tp)) as several:
            found[tp] = tokens(generate(several.engine, prompts, params))
            held[tp] = several.memory()
    assert found[3] == found[1]
    norms = (30 * 2 + 1) * 576 * 4
    share = norms + (held[1][0].weights - norms) // 3
    assert all(share <= m.weights < 1.02 * share for m in held[3])  # a packed weight is filled up to whole panels
    assert {m.pool for m in held[3]} == {held[1][0].pool // 3}


# --- deaths ---


def two_processes(path: Path, step_timeout_s: float) -> tuple[Engine, object, queue.Queue[str]]:
    """An engine whose follower is a process; what its group says when it breaks comes out of the queue."""
    options = tiny_options(path, 2, step_timeout_s)
    broken: queue.Queue[str] = queue.Queue()
    listener = listen(LOOPBACK)
    process = spawn(follower_process, 1, 2, address_of(listener), options)
    group = lead(listener, 2, step_timeout_s, broken.put, torch.device("cpu"))
    return build_engine(options, KEY, group=group), process, broken


def steps(engine: Engine, count: int) -> None:
    for _ in range(count):
        engine.step()


def test_a_killed_follower_is_noticed_in_the_step_and_without_one(tmp_path: Path) -> None:
    random_model(MODELS["llama"]).save_pretrained(tmp_path)
    engine, process, broken = two_processes(tmp_path, 600.0)
    generate(engine, PROMPTS, GREEDY)
    engine.submit(GenerateRequest("late", ((1, 2, 3),), SamplingParams(max_tokens=40, ignore_eos=True)))
    engine.step()
    os.kill(process.pid, signal.SIGKILL)
    killed_s = time.monotonic()
    with pytest.raises(GroupBroken) as caught:
        steps(engine, 100)
    assert ".cc:" not in str(caught.value)  # what happened, not where in the library
    assert "a rank is gone" in broken.get(timeout=WAIT_S)  # nobody had to compute for this
    assert time.monotonic() - killed_s < 300.0  # not the limit of a step
    with pytest.raises(GroupBroken, match="cannot forget a step that failed"):
        engine.step()
    process.join(WAIT_S)


@pytest.mark.parametrize("busy", [False, True])
def test_a_stopped_follower_ends_the_replica(busy: bool, tmp_path: Path) -> None:
    random_model(MODELS["llama"]).save_pretrained(tmp_path)
    options = tiny_options(tmp_path, 2, 2.0)
    codes: queue.Queue[int] = queue.Queue()
    actor = ReplicaActor("r0", 1, options, KEY, die=codes.put)
    process = spawn(follower_process, 1, 2, asyncio.run(actor.rendezvous()), options)
    while not (report := asyncio.run(actor.report()))["info"]:
        assert report["failure"] is None
        time.sleep(0.02)
    assert report["weight_bytes"] > 0
    assert codes.empty()
    os.kill(process.pid, signal.SIGSTOP)
    if busy:  # a step begins that never ends
        actor._loop.subscribe("i", lambda frame: None)
        actor._loop.submit("i", GenerateRequest("a", ((1, 2, 3),), SamplingParams(max_tokens=5)))
    assert codes.get(timeout=WAIT_S) == 1
    assert asyncio.run(actor.report())["failure"]
    process.kill()
    process.join(WAIT_S)


def test_a_dead_leader_ends_its_followers(tmp_path: Path) -> None:
    random_model(MODELS["llama"]).save_pretrained(tmp_path)
    options = tiny_options(tmp_path, 2)
    addresses = get_context("spawn").Queue()
    process = spawn(leader_process, options, addresses)
    codes: queue.Queue[int] = queue.Queue()
    follower = RankActor(1, 2, addresses.get(timeout=WAIT_S), options, die=codes.put)
    ready_report(follower)
    assert codes.empty()  # it waits for a plan, as long as the leader lives
    process.kill()
    assert codes.get(timeout=WAIT_S) == 1
    process.join(WAIT_S)


def test_a_rank_that_has_no_leader_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.worker.parallel._JOIN_TIMEOUT", timedelta(seconds=1))
    listener = listen(LOOPBACK)
    address = address_of(listener)
    listener.close()
    follower = RankActor(1, 2, address, tiny_options(tmp_path, 2))
    while (failure := asyncio.run(follower.report())["failure"]) is None:
        time.sleep(0.01)
    assert f"rank 1: no leader at {address}" in failure


def test_a_rank_that_cannot_load_tells_the_leader(tmp_path: Path) -> None:
    random_model(MODELS["llama"]).save_pretrained(tmp_path)
    options = tiny_options(tmp_path, 2)
    listener = listen(LOOPBACK)
    follower = RankActor(1, 2, address_of(listener), tiny_options(tmp_path / "nowhere", 2))
    group = lead(listener, 2, 60.0, lambda why: None, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"rank 1: .*nowhere"):
        build_engine(options, KEY, group=group)
    while (failure := asyncio.run(follower.report())["failure"]) is None:
        time.sleep(0.01)
    assert "nowhere" in failure
    group.close()
