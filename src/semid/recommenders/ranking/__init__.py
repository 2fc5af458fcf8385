"""Ranking (CTR) models that read Semantic IDs: data, features, models, training, analysis."""
