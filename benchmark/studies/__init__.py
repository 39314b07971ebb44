"""One-off work behind committed choices: searches on validation items, training of bundled weights."""
