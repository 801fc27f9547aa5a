"""Every Ray call of the cluster, around classes that know nothing of Ray.

| file | whose calls |
|---|---|
| `driver` | of a command line: Ray itself, the controller |
| `controller_actor`, `watch`, `lives` | of the controller: its actor, the replicas that it follows, starts and ends |
| `ports` | of an ingress, and of the admin API |
"""

from ...worker.actor import start_actor_logging
from .calls import remote_class
from .driver import Cluster, ClusterView, Lease, ReplicaView, join, namespaces, serves
from .ports import AdminPort, Registration, connect

__all__ = [
    "AdminPort",
    "Cluster",
    "ClusterView",
    "Lease",
    "Registration",
    "ReplicaView",
    "connect",
    "join",
    "namespaces",
    "remote_class",
    "serves",
    "start_actor_logging",
]
