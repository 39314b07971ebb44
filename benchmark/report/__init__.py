"""Views of the store for readers: tables, figures, and the published values beside them."""
