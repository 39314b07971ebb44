"""Searches that several methods share: of scales, quantiles and clips, by the error they leave."""
