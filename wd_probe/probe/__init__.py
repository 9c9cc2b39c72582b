"""Hooks around the optimizer's step, and what they count: R_op per step, tensor and layer."""
