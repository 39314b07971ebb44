"""A folder of pages that opens from disk: the leaderboard, and pages of methods, models, suites and cells."""
