"""Learned rounding of weights: the parts of a network, and the reconstruction of what they give."""
