"""What one replica needs of the Ray cluster, and which of it is missing. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

ACCELERATOR = "accelerator_type:"  # Ray's resource of nodes with that accelerator
ACCELERATOR_SHARE = 0.001  # of it, for a rank: as Ray itself asks for it


@dataclass(frozen=True, slots=True)
class Demand:
    """The bundles of one replica.

    Attributes:
        bundle: resources of one rank.
        ranks: how many bundles there are.
        together: all of them on one node.
        labels: that a node must carry.
    """

    bundle: dict[str, float]
    ranks: int = 1
    together: bool = True
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def strategy(self) -> str:
        """Ray's name for how the bundles lie."""
        return "STRICT_PACK" if self.together else "PACK"


@dataclass(frozen=True, slots=True)
class Node:
    """A live node of the Ray cluster: what it has in all, and its labels."""

    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)


def missing(demand: Demand, nodes: list[Node]) -> str:
    """What keeps a replica from ever fitting on these nodes, in words. Empty when it would fit if nobody else were there."""
    wanted = ", ".join(f"{key}={value}" for key, value in demand.labels.items())
    carrying = [n.resources for n in nodes if demand.labels.items() <= n.labels.items()]
    if wanted and not carrying:
        return f"a node with the label {wanted} (none of {len(nodes)} has it)"
    where = f"node with the label {wanted}" if wanted else "node"
    if demand.together:
        whole = {name: amount * demand.ranks for name, amount in demand.bundle.items()}
        return _missing_on_one(whole, carrying, where)
    lacks = _missing_on_one(demand.bundle, carrying, where)
    places = sum(_places(demand.bundle, node) for node in carrying)
    if not lacks and places < demand.ranks:
        each = ", ".join(_amounts(demand.bundle))
        return f"{demand.ranks} places with {each} each (all nodes together have {places})"
    return lacks


def _missing_on_one(demand: dict[str, float], nodes: list[dict[str, float]], where: str) -> str:
    if any(all(node.get(name, 0.0) >= amount for name, amount in demand.items()) for node in nodes):
        return ""
    largest = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in demand}
    lacks = [
        f"a {where} with a {name.removeprefix(ACCELERATOR)}"
        if name.startswith(ACCELERATOR)
        else f"{amount:g} {name} (the largest {where} has {largest[name]:g})"
        for name, amount in demand.items()
        if largest[name] < amount
    ]
    return ", ".join(lacks) or f"one {where} with " + ", ".join(_amounts(demand))


def _amounts(demand: dict[str, float]) -> list[str]:
    return [name if name.startswith(ACCELERATOR) else f"{amount:g} {name}" for name, amount in demand.items()]


def _places(bundle: dict[str, float], node: dict[str, float]) -> int:
    return int(min((node.get(name, 0.0) / amount for name, amount in bundle.items()), default=0.0) + 1e-9)
