"""What is said when the Ray cluster has no place for a replica."""

from __future__ import annotations

import pytest

from quire.cluster.placement import Demand, Node, missing

GPU = {"CPU": 1.0, "GPU": 1.0}
H200 = {**GPU, "accelerator_type:H200": 0.001}


def node(labels: dict[str, str] | None = None, **resources: float) -> Node:
    return Node({name.replace("__", ":"): amount for name, amount in resources.items()}, labels or {})


@pytest.mark.parametrize(
    ("demand", "nodes", "said"),
    [
        (Demand(GPU), [node(CPU=8)], "1 GPU (the largest node has 0)"),
        (Demand({"CPU": 4}), [node(CPU=2), node(CPU=3)], "4 CPU (the largest node has 3)"),
        (Demand({"CPU": 4, "GPU": 1}), [node(CPU=4), node(CPU=1, GPU=1)], "one node with 4 CPU, 1 GPU"),
        (Demand({"CPU": 1}), [], "1 CPU (the largest node has 0)"),
        (Demand({"CPU": 2}), [node(CPU=2)], ""),
        (Demand(GPU, ranks=4), [node(CPU=8, GPU=2), node(CPU=8, GPU=2)], "4 GPU (the largest node has 2)"),
        (Demand(GPU, ranks=4, together=False), [node(CPU=8, GPU=2), node(CPU=8, GPU=2)], ""),
        (
            Demand(GPU, ranks=4, together=False),
            [node(CPU=8, GPU=2), node(CPU=1, GPU=2)],
            "4 places with 1 CPU, 1 GPU each (all nodes together have 3)",
        ),
        (Demand(H200), [node(CPU=8, GPU=8, accelerator_type__A100=1)], "a node with a H200"),
        (Demand(H200), [node(CPU=8, GPU=8, accelerator_type__H200=1)], ""),
        (Demand(H200, ranks=8), [node(CPU=8, GPU=8, accelerator_type__H200=1)], ""),
        (Demand(GPU, labels={"pool": "b"}), [node({"pool": "a"}, CPU=8, GPU=8)], "a node with the label pool=b (none of 1 has it)"),
        (
            Demand(GPU, labels={"pool": "b"}),
            [node({"pool": "a"}, CPU=8, GPU=8), node({"pool": "b"}, CPU=8)],
            "1 GPU (the largest node with the label pool=b has 0)",
        ),
    ],
)
def test_what_is_missing_is_named(demand: Demand, nodes: list[Node], said: str) -> None:
    assert missing(demand, nodes) == said
