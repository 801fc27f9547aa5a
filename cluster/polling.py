"""How often the controller asks a replica what has changed. Pure.

One long poll at a time for each replica, and a pause after each that grows with the number of replicas, so that the controller's own
work stays a fraction of one core however many there are.
"""

EVENT_WAIT_S = 0.5  # for which a replica without news keeps the question
MIN_POLL_S = 0.02
POLL_COST_S = 0.004  # twice what one poll costs the controller: all of them take half a core at most


def pause_s(replicas: int) -> float:
    """Between an answer and the next question, when there are so many replicas."""
    return max(MIN_POLL_S, POLL_COST_S * replicas)
