"""Loading weights: their sources, their architecture, and the network that fits them."""
