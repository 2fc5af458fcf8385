"""The learning rate of each step."""

from __future__ import annotations

import math

__all__ = ["FLOOR", "learning_rate"]

FLOOR = 0.01
"""Where the cosine ends, as a share of the peak."""


def learning_rate(step: int, *, total: int, peak: float, schedule: str, warmup: float) -> float:
    """Return the rate of a step; a function of its number, so a resumed run needs no state.

    Args:
        step: number of the step, from 0.
        total: steps of the whole run.
        peak: highest rate.
        schedule: ``cosine`` or ``constant``.
        warmup: share of the steps over which the rate rises linearly.
    """
    rising = round(warmup * total)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    if schedule == "constant":
        return peak
    done = (step - rising) / max(total - rising, 1)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
