"""Values others published, as CSV; the first column is the source. See :mod:`.reader`."""
