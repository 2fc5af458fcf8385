"""All generators: their share of a long run, and how many of their cases the normal tests run."""

from __future__ import annotations

import generators_cli as c
import generators_data as d
import generators_files as f
from fuzzing import Generator

GENERATORS: dict[str, Generator] = {
    function.__name__: function
    for function in (
        d.npy, d.matrix, d.frame, d.ids, d.interactions, d.items, d.predict,
        f.artefact, f.ranker, f.ids_file, f.bundle, f.recipe, f.imports, f.any_ids, f.codebooks,
        f.export, f.openonerec_text, c.flags, c.overwrite, c.resume, c.constructor, c.report,
    )
}  # fmt: skip

WEIGHTS = {"flags": 40, "overwrite": 15, "resume": 5, "report": 1, "frame": 25, "artefact": 15,
           "openonerec_text": 5, "recipe": 15}  # fmt: skip
"""Shares of a long run; 10 for those not named."""


def case_names(examples: int, seed: int) -> list[str]:
    """Return the names of ``examples`` cases, by the weights of their generators, mixed."""
    weights = {name: WEIGHTS.get(name, 10) for name in GENERATORS}
    total = sum(weights.values())
    counts = {name: max(1, round(examples * w / total)) for name, w in weights.items()}
    pairs = sorted(((k + 0.5) / n, name, k) for name, n in counts.items() for k in range(n))
    return [f"{name}:{seed}:{k}" for _, name, k in pairs]
