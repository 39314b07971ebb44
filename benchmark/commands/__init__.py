"""Commands: one module each.

A module decorates a function with ``benchmark.cli.cli.command``, and imports heavy things inside it.
"""
