"""Weights scaled to zero without training (Eq. 12), and what that does to features."""
