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
from semid.health._energy import Concentration, EnergyCounter, ErrorSums, Inputs
from semid.health._thresholds import (
    GEOMETRY,
    NEAR,
    ROWS_PER_CODEWORD,
    THRESHOLDS,
    Threshold,
    threshold_table,
)
from semid.health._usage import LevelUsage, UsageCounter, check_codes, usage, usage_from_counts
from semid.health._verdict import CONCENTRATED, Finding, Verdict, graded, judge, verdict

__all__ = [
    "CONCENTRATED",
    "GEOMETRY",
    "NEAR",
    "ROWS_PER_CODEWORD",
    "THRESHOLDS",
    "Capacity",
    "CapacityCounter",
    "CollisionCounter",
    "Collisions",
    "Concentration",
    "EnergyCounter",
    "ErrorSums",
    "Finding",
    "Inputs",
    "LevelUsage",
    "Threshold",
    "UsageCounter",
    "Verdict",
    "bucket_keys",
    "check_codes",
    "collisions",
    "graded",
    "judge",
    "merge_capacities",
    "merge_collisions",
    "part_of",
    "row_hashes",
    "threshold_table",
    "usage",
    "usage_from_counts",
    "verdict",
]
