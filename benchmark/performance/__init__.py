"""Speed as ratios, side by side in one run: ``python -m benchmark perf``; a row is a file of its own."""
