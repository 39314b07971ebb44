"""Speed as ratios, side by side in one run: ``python -m benchmark.performance NAME``; one file each."""
