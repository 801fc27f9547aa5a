"""The load client behind `quire bench`: what to send, when, and what came back how fast."""
