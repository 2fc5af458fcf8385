"""What comes in: embeddings, item ids, interactions, item texts, and a synthetic catalogue."""
