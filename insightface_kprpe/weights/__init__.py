"""Weights in: where they come from, what they are of, and the network that fits them."""
