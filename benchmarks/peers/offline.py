"""One engine, offline, in a process of its own: `benchmarks/vs_peers.py` runs this with the interpreter that has the engine.

    python offline.py ENGINE MODEL_DIR PROMPTS.json OUTPUT_TOKENS [QUANTIZE]

PROMPTS.json holds rounds, each a list of token-id lists that run at once. Prints one JSON line: seconds of each round, and
the seconds that loading took. Every engine generates exactly OUTPUT_TOKENS tokens, greedily, past any end of sequence.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

Prompts = list[list[int]]


def quire(model: str, output_tokens: int, quantize: str | None) -> Callable[[Prompts], int]:
    from quire import LLM, SamplingParams

    llm = LLM(model, quantize=quantize)
    params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    return lambda prompts: sum(len(o.outputs[0].token_ids) for o in llm.generate(prompts, params, progress=False))


def transformers(model: str, output_tokens: int, quantize: str | None) -> Callable[[Prompts], int]:
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = GenerationConfig(max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=512, max_batch_tokens=512)

    def run(prompts: Prompts) -> int:
        results = loaded.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=batching, progress_bar=False)
        return sum(len(r.generated_tokens) for r in results.values())

    return run


def vllm(model: str, output_tokens: int, quantize: str | None) -> Callable[[Prompts], int]:
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="float32", max_model_len=2048, enable_prefix_caching=False)
    params = SamplingParams(max_tokens=output_tokens, min_tokens=output_tokens, temperature=0.0, ignore_eos=True)

    def run(prompts: Prompts) -> int:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs)

    return run


def llama_cpp(model: str, output_tokens: int, quantize: str | None) -> Callable[[Prompts], int]:
    """One stream at a time: the package's own interface has no batching."""
    from llama_cpp import Llama

    llama = Llama(model, n_ctx=2048, n_threads=2, n_threads_batch=2, verbose=False)

    def run(prompts: Prompts) -> int:
        total = 0
        for prompt in prompts:
            llama.reset()
            for count, _ in enumerate(llama.generate(prompt, temp=0.0), start=1):
                if count == output_tokens:
                    break
            total += output_tokens
        return total

    return run


ENGINES = {"quire": quire, "transformers": transformers, "vllm": vllm, "llama.cpp": llama_cpp}


def main() -> None:
    engine, model, prompts_file, output_tokens = sys.argv[1:5]
    quantize = sys.argv[5] if len(sys.argv) > 5 else None
    rounds = json.loads(Path(prompts_file).read_text())
    started = time.perf_counter()
    generate = ENGINES[engine](model, int(output_tokens), quantize)
    load_s = time.perf_counter() - started
    generate([rounds[0][0]])  # what is compiled or allocated at the first use is not what is compared
    seconds = []
    for prompts in rounds:
        started = time.perf_counter()
        tokens = generate(prompts)
        seconds.append(time.perf_counter() - started)
        if tokens != len(prompts) * int(output_tokens):
            raise RuntimeError(f"{engine} made {tokens} tokens of {len(prompts)} x {output_tokens}")
    print("RESULT " + json.dumps({"load_s": load_s, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
