"""On which items the noise of rounding is measured, by the names that suites use."""

SUBSET, ALL, UNMEASURED = "subset", "all", "none"
NOISE = (SUBSET, ALL, UNMEASURED)
"""A fixed tenth of the measured items, every one of them, or not at all."""
