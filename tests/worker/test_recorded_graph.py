"""The stand-in for a CUDA graph keeps to its rules."""

from __future__ import annotations

import pytest
import torch
from recorded_graph import RecordedGraph


def test_a_replay_reads_memory_as_it_is_then_and_numbers_as_they_were():
    x, factor = torch.arange(4.0), [2.0]
    replay, result = RecordedGraph()(lambda: x[1:] * factor[0] + 1)
    x += 10
    factor[0] = 100.0
    replay()
    assert result.tolist() == [23.0, 25.0, 27.0]


def test_memory_that_nobody_has_kept_is_missed():
    held = [torch.ones(3)]
    replay, _ = RecordedGraph()(lambda: held[0] + 1)
    replay()
    held.clear()
    with pytest.raises(RuntimeError, match="freed"):
        replay()


@pytest.mark.parametrize("wait", [lambda x: x * x.sum().item(), lambda x: x[x > 1], lambda x: x.nonzero()])
def test_what_waits_for_the_device_is_refused(wait):
    x = torch.arange(4.0)
    with pytest.raises(RuntimeError, match="waits for the device"):
        RecordedGraph()(lambda: wait(x))
