"""What a model is measured on: items, splits, loss and metric; one file a kind of task."""
