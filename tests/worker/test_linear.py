"""Linear layers: every form against float64, and the same bits for a token in every batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quire.kernels import cpu, cpu_linear
from quire.worker.linear import CompiledLinear, Int8Linear, OneDnnLinear, PlainLinear, linear_factory

compiled = pytest.mark.skipif(not cpu.available(), reason="there is no C compiler here")
SHAPES = [(1, 1), (48, 64), (100, 576), (577, 100), (5, 1000), (960, 576)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def rounded(x: Tensor) -> Tensor:
    """x as 8 bits show it, float64."""
    q, scale = cpu_linear.quantize(x)
    return (q.double() * scale[:, :, None].double()).flatten(1)[:, : x.shape[1]]


@compiled
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 7, 8, 9, 33, 150])
def test_fp32_and_int8(outputs: int, inputs: int, biased: bool, tokens: int) -> None:
    x, weight = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if biased else None
    wide = None if bias is None else bias.double()
    exact = CompiledLinear(weight, bias)
    assert error(exact(x), F.linear(x.double(), weight.double(), wide)) < 1e-6
    eight = Int8Linear(weight, bias)
    assert error(eight(x), F.linear(rounded(x), rounded(weight), wide)) < 1e-6


@compiled
@pytest.mark.parametrize("form", [CompiledLinear, Int8Linear])
def test_a_token_has_the_same_bits_in_every_batch(form: type[CompiledLinear] | type[Int8Linear]) -> None:
    layer = form(torch.randn(203, 576), torch.randn(203))
    x = torch.randn(141, 576)  # more than the tokens that go through a panel together
    together = layer(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for tokens in (1, 2, 6, 17, 70):
                for first in range(0, 141 - tokens, 13):
                    assert torch.equal(layer(x[first : first + tokens]), together[first : first + tokens])
    finally:
        torch.set_num_threads(before)


@compiled
def test_int8_keeps_small_inputs_beside_large_ones() -> None:
    x, weight = torch.randn(4, 576), torch.randn(64, 576)
    x[:, 3] = 1000.0  # only its own group gets coarser
    weight[:, :64] = 0
    assert error(Int8Linear(weight, None)(x), F.linear(x.double(), weight.double())) < 0.02


@compiled
def test_int8_extremes() -> None:
    """The largest products there are must not saturate; zeros stay zeros; what is not finite shows."""
    x = torch.full((1, 512), 3.0)
    weight = torch.cat((torch.full((1, 512), 2.0), torch.full((1, 512), -2.0), torch.zeros(1, 512)))
    layer = Int8Linear(weight, None)
    torch.testing.assert_close(layer(x), torch.tensor([[3072.0, -3072.0, 0.0]]))
    torch.testing.assert_close(layer(-x), torch.tensor([[-3072.0, 3072.0, 0.0]]))
    assert torch.equal(layer(torch.zeros(1, 512)), torch.zeros(1, 3))
    for bad in (float("nan"), float("inf")):
        x[0, 100] = bad
        assert layer(x).isnan().all()


def test_forms_that_torch_brings() -> None:
    x, weight, bias = torch.randn(5, 576), torch.randn(96, 576), torch.randn(96)
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert error(PlainLinear(weight, bias)(x), expected) < 1e-6
    if torch._C._has_mkldnn:
        assert error(OneDnnLinear(weight, bias)(x), expected) < 1e-6


def test_the_factory_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linear_factory("cuda", torch.bfloat16, None) is PlainLinear
    assert linear_factory("cpu", torch.bfloat16, None) is PlainLinear
    monkeypatch.setattr(cpu, "available", lambda: True)
    assert linear_factory("cpu", torch.float32, None) is CompiledLinear
    assert linear_factory("cpu", torch.float32, "int8") is Int8Linear
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert linear_factory("cpu", torch.float32, None) in (OneDnnLinear, PlainLinear)
    with pytest.raises(ValueError, match="compiler"):
        linear_factory("cpu", torch.float32, "int8")


@pytest.mark.parametrize(
    ("device", "dtype", "quantize"), [("cuda", torch.float32, "int8"), ("cpu", torch.bfloat16, "int8"), ("cpu", torch.float32, "int4")]
)
def test_the_factory_refuses(device: str, dtype: torch.dtype, quantize: str) -> None:
    with pytest.raises(ValueError, match="quantize"):
        linear_factory(device, dtype, quantize)
