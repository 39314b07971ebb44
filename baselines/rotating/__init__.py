"""Rotation: residual streams found in a model, orthogonal matrices, and the weights they change."""
