"""Where kernel tests run. The Triton rig is tests/kernels/interpreter.py; tests import it as `interpreter`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the rig


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu" is Triton's interpreter, with bfloat16 mended; "cuda" compiled kernels, chosen with -m gpu."""
    name: str = request.param
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device")
    else:
        import interpreter

        interpreter.install()
    return name
