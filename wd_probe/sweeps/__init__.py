"""Grids of training runs, their results over seeds, and the paper's tables and figures."""
