"""Health of codes: usage, collisions and a verdict, from the codes alone.

Numpy arrays in, frozen dataclasses out; nothing here needs a model, a file or torch, so every
tokenizer can judge itself right after a fit. Wider diagnostics live in `semid.diagnostics`.
"""

from semid.health._capacity import Capacity, CapacityCounter, merge_capacities
from semid.health._collisions import (
    CollisionCounter,
    Collisions,
    bucket_keys,
    collisions,
    merge_collisions,
    part_of,
    row_hashes,
)
from semid.health._usage import LevelUsage, UsageCounter, check_codes, usage, usage_from_counts
from semid.health._verdict import Finding, Verdict, verdict

__all__ = [
    "Capacity",
    "CapacityCounter",
    "CollisionCounter",
    "Collisions",
    "Finding",
    "LevelUsage",
    "UsageCounter",
    "Verdict",
    "bucket_keys",
    "check_codes",
    "collisions",
    "merge_capacities",
    "merge_collisions",
    "part_of",
    "row_hashes",
    "usage",
    "usage_from_counts",
    "verdict",
]
