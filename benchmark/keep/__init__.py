"""What is kept: store, records, stages and the lock file; every file whole or absent."""
