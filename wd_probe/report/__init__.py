"""One HTML page of runs and sweeps."""
