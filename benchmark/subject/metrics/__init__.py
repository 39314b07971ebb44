"""How predictions are judged and how the numbers are shown."""
