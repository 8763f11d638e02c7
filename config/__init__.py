"""Process settings, read once at start, and rule files that are data."""
