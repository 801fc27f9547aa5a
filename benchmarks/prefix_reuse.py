"""Time to first token of a request whose first 1,500 tokens another has already computed, against one that shares nothing.

python benchmarks/prefix_reuse.py
"""

import argparse
import os
import statistics
import time
from pathlib import Path

from tqdm import trange

from quire import LLM, SamplingParams

FIRST_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)


def main() -> None:
    data = Path(os.environ.get("QUIRE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=data / "prompts" / "shakespeare_sonnets.txt", help="where prompts are cut from")
    parser.add_argument("--shared-tokens", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    llm = LLM(progress=False, kv_pages=1024)
    ids = llm.tokenizer.encode(args.text.read_text())
    cold_s, warm_s, computed = [], [], []
    for r in trange(args.rounds, desc="rounds"):
        shared = ids[r * args.shared_tokens : (r + 1) * args.shared_tokens]
        for tail, seconds in ((100, cold_s), (200, warm_s)):
            started = time.perf_counter()
            (answer,) = llm.generate([[*shared, tail]], FIRST_TOKEN, progress=False)
            seconds.append(time.perf_counter() - started)
        computed.append(len(shared) + 1 - answer.cached_tokens)
    cold_ms, warm_ms = statistics.median(cold_s) * 1e3, statistics.median(warm_s) * 1e3
    print(f"TTFT of {args.shared_tokens + 1} tokens, none of them cached: {cold_ms:.0f} ms")
    print(f"TTFT when {args.shared_tokens} of them are shared: {warm_ms:.0f} ms, {cold_ms / warm_ms:.0f} times faster")
    print(f"tokens computed for the second request: {max(computed)} (page size 32)")


if __name__ == "__main__":
    main()
