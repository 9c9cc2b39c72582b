"""The probes on timm models and datasets: what the command line runs."""
