"""Running a cell: session, measurement, executors, environment and progress."""
