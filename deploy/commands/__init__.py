"""One module for each command of `quire`; heavy imports happen when the command runs."""
