"""Formats of other programs: ids and models as trainers, rankers and servers read them."""
