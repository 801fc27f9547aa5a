"""Quire in virtual time: the cluster's real deciding classes over replicas that only count tokens and pages.

`simulation.Simulation` plays requests through them; `speed_profile` says how long a replica's step takes; `roofline` derives such a
profile from a data sheet, `fit` from measurements. Nothing here reads a clock or draws a random number.
"""
