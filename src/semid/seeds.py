"""Seeds: one integer from the user, a child generator for every place that draws.

Nothing in semid touches a global generator. A place that needs randomness names itself
(`"seeding", level, restart`), so adding a draw in one place cannot change another.
"""

from __future__ import annotations

import hashlib

import numpy as np

from semid.lazy import torch


def child_seed(seed: int, *names: object) -> int:
    """Derive a 63-bit seed from a seed and names of what draws, such as ``("kmeans", level)``."""
    path = "/".join([str(int(seed)), *map(str, names)])
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "little") >> 1


def numpy_generator(seed: int, *names: object) -> np.random.Generator:
    """Return a numpy generator of its own for the named place."""
    return np.random.default_rng(child_seed(seed, *names))


def torch_generator(seed: int, *names: object) -> torch.Generator:
    """Return a CPU torch generator of its own for the named place."""
    return torch.Generator().manual_seed(child_seed(seed, *names))
