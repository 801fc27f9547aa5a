"""The image, installed once."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from image import ROOT, Image


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="session")
def values() -> dict[str, Any]:
    """values.yaml."""
    return yaml.safe_load((ROOT / "helm" / "values.yaml").read_text(encoding="utf-8"))
