"""Suites and the cells they expand to: one generator for every executor."""
