"""The product of the deterministic mode: right, and the same bits whatever rows stand beside."""

from __future__ import annotations

import pytest
import torch
from interpreter import error, random, tolerance

from quire.kernels.fixed_matmul import fixed_matmul


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "outputs", "inner", "bias"), [(1, 64, 64, False), (33, 100, 192, True), (5, 65, 97, True)])
def test_product(device, dtype, rows, outputs, inner, bias):
    x = random((rows, inner + 8), dtype, device)[:, :inner]  # rows with gaps between them
    weight = random((outputs, inner), dtype, device)
    added = random((outputs,), dtype, device) if bias else None
    expected = x.double() @ weight.double().T + (added.double() if added is not None else 0)
    assert error(fixed_matmul(x, weight, added), expected) < tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch(device, dtype):
    x, weight = random((40, 160), dtype, device), random((96, 160), dtype, device)
    together = fixed_matmul(x, weight)
    for rows in (slice(0, 1), slice(17, 18), slice(30, 40)):
        assert torch.equal(fixed_matmul(x[rows].contiguous(), weight), together[rows])


def test_refuses_what_has_no_product(device):
    x = torch.zeros(2, 64, device=device)
    for weight, bias, said in [(torch.zeros(8, 65), None, "no product"), (torch.zeros(8, 64).half(), None, "no product"),
                               (torch.zeros(8, 64), torch.zeros(7), "bias")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            fixed_matmul(x, weight.to(device), None if bias is None else bias.to(device))
    assert fixed_matmul(x[:0], torch.zeros(8, 64, device=device)).shape == (0, 8)
