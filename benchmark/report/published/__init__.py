"""Values others published, as CSV whose first column is the source, and what they are comparable with."""
