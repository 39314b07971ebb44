"""Data that lives in the repository as Parquet: manifest, committed splits and the script that made them."""
