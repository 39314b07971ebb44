"""Figures: one file each; :mod:`benchmark.report.figures.figure` tells what a file has to register."""
