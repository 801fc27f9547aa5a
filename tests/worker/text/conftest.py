"""The tokenizer of the default model, or a skip where its weights are not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.worker.text.source import ModelNotFound, resolve_model
from quire.worker.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    try:
        return resolve_model("smollm2")
    except ModelNotFound as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)
