"""The benchmark suite: cells, store, executors and the views made of them; run as ``python -m benchmark``."""
