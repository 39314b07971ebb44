"""Suites: one TOML file each; read by :mod:`benchmark.grid.suite`."""
