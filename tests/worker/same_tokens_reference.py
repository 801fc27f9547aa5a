"""What transformers' `generate` continues real prompts with: the reference of test_same_tokens.py.

    python tests/worker/same_tokens_reference.py    writes smollm2_reference.json: some minutes on two cores

The prompts are the first 32 MT-bench questions through the chat template, and 8 contexts of 1,500 tokens and more cut from the sonnets.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from quire.worker.text.source import resolve_model
from quire.worker.text.tokenizer import load_tokenizer

QUESTIONS, LONG_CONTEXTS, LONG_TOKENS, NEW_TOKENS = 32, 8, 1500, 64
NO_TOKEN = -1  # as end of sequence: go on past it
RECORD = Path(__file__).with_name("smollm2_reference.json")


class Reference:
    """transformers on the weights that Quire reads. They are loaded when they are needed: most tests find no tie."""

    @cached_property
    def model(self) -> Any:
        path = resolve_model("smollm2")
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Greedy continuations of a batch, padded on the left."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0)
        return self.model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()

    @torch.inference_mode()
    def gap(self, context: list[int]) -> float:
        """Between the two highest logits after `context`."""
        best = self.model(torch.tensor([context]), logits_to_keep=1).logits[0, -1].topk(2).values
        return float(best[0] - best[1])


def prompts_of(questions: Path, sonnets: Path) -> list[list[int]]:
    """Token ids of the questions, then of the long contexts."""
    tokenizer = load_tokenizer(resolve_model("smollm2"))
    with gzip.open(questions, "rt") as file:
        turns = [json.loads(line)["turns"][0] for line in list(file)[:QUESTIONS]]
    rendered = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in turns]
    text = tokenizer.encode(sonnets.read_text())
    long = [text[i * 2000 : i * 2000 + LONG_TOKENS + 37 * i] for i in range(LONG_CONTEXTS)]
    return [tokenizer.encode(prompt, add_special_tokens=False) for prompt in rendered] + long


def name_of(prompts: list[list[int]]) -> str:
    """The record is of these prompts and of this model file."""
    digest = hashlib.sha256(resolve_model("smollm2").read_bytes())
    digest.update(json.dumps(prompts).encode())
    return digest.hexdigest()


def recorded(prompts: list[list[int]]) -> list[list[int]] | None:
    """The continuations that the record holds; None when it is of other prompts or another model."""
    record = json.loads(RECORD.read_text())
    return record["tokens"] if record["of"] == name_of(prompts) else None


def main() -> None:
    data = Path(os.environ.get("QUIRE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data") / "prompts"
    prompts = prompts_of(data / "mt_bench_question.jsonl.gz", data / "shakespeare_sonnets.txt")
    reference = Reference()
    tokens = reference.generate(prompts[:QUESTIONS]) + reference.generate(prompts[QUESTIONS:])
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in tokens)
    RECORD.write_text(f'{{"of": "{name_of(prompts)}",\n"tokens": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    main()
