"""What is measured on what: models, tasks, metrics, data and pretrained assets."""
