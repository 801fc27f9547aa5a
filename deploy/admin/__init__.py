"""The operators' API, on a port and with a token of its own: `server.start_admin` needs an `AdminPort`, and knows nothing of Ray."""
