"""Models that recommend the next item."""
