"""From labels to files."""
