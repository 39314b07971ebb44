"""MLflow as a view that can be rebuilt from the store."""
