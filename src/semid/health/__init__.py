"""Health of codes: usage, collisions and a verdict, from the codes alone.

Numpy arrays in, frozen dataclasses out. Nothing here needs a model, a file or torch, so every
tokenizer can evaluate itself right after a fit. Wider diagnostics are in `semid.diagnostics`.
"""

from semid.health._collisions import (
    Capacity,
    CapacityCounter,
    CollisionCounter,
    Collisions,
    collisions,
    merge_capacities,
    merge_collisions,
    part_of,
)
from semid.health._counters import (
    Concentration,
    EnergyCounter,
    ErrorSums,
    Inputs,
    LevelUsage,
    UsageCounter,
    bucket_keys,
    check_codes,
    row_hashes,
    usage,
    usage_from_counts,
)
from semid.health._evidence import EVIDENCE_FILE, Evidence, Predictor, read_evidence
from semid.health._verdict import (
    CONCENTRATED,
    GEOMETRY,
    NEAR,
    ROWS_PER_CODEWORD,
    THRESHOLDS,
    Finding,
    Threshold,
    Verdict,
    evaluate_threshold,
    threshold_table,
    verdict,
)

__all__ = [
    "CONCENTRATED",
    "EVIDENCE_FILE",
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
    "Evidence",
    "Finding",
    "Inputs",
    "LevelUsage",
    "Predictor",
    "Threshold",
    "UsageCounter",
    "Verdict",
    "bucket_keys",
    "check_codes",
    "collisions",
    "evaluate_threshold",
    "merge_capacities",
    "merge_collisions",
    "part_of",
    "read_evidence",
    "row_hashes",
    "threshold_table",
    "usage",
    "usage_from_counts",
    "verdict",
]
