"""Weights in and out, with a numerical proof of every conversion."""
