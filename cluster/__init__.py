"""The controller: admission, routing, recovery; and how a front end talks to replicas."""
