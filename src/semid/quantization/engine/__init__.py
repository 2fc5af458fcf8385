"""Exact search by screening: cheap scores, a proven bound, float64 decisions (see README.md)."""

__all__: list[str] = []
