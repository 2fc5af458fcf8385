"""Models that use Semantic IDs: ranking; each in a package of its own."""
