"""Pretrained weights: what they are (``catalogue``), where they come from (``fetch``), how they are kept."""
