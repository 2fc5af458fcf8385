"""Model and optimizer as flat arrays by name, which is what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["load_module_", "load_optimizer_", "module_arrays", "optimizer_arrays"]

Arrays = dict[str, np.ndarray]


def module_arrays(module: nn.Module) -> Arrays:
    """Return a copy of every parameter and buffer of ``module``."""
    return {
        name: tensor.detach().cpu().numpy().copy() for name, tensor in module.state_dict().items()
    }


def load_module_(module: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Put back what `module_arrays` gave.

    A module on the device ``meta`` takes memory here alone, for arrays that fit it.

    Raises:
        ValueError: an array is missing, unknown, or of another shape or type.
    """
    state = module.state_dict()
    problems = [f"'{name}' is missing" for name in state if name not in arrays]
    for name, array in arrays.items():
        if name not in state:
            problems.append(f"'{name}' is unknown")
            continue
        # A scalar was stored as one number up to format version 1 of artefacts.
        shape = () if array.shape == (1,) and not state[name].shape else array.shape
        if shape != tuple(state[name].shape):
            problems.append(
                f"'{name}' has shape {shape}, the settings ask for {tuple(state[name].shape)}"
            )
        elif array.dtype.kind not in ("f" if state[name].is_floating_point() else "biu"):
            problems.append(f"'{name}' holds {array.dtype}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError("; ".join(problems[:3]) + more)
    on_meta = any(tensor.is_meta for tensor in state.values())
    tensors = {
        name: torch.from_numpy(np.array(array) if on_meta else array)
        .to(state[name].dtype)
        .reshape(state[name].shape)
        for name, array in arrays.items()
    }
    module.load_state_dict(tensors, assign=on_meta)


def optimizer_arrays(optimizer: torch.optim.Optimizer) -> Arrays:
    """Return the optimizer's state by parameter number and name; rates are the schedule's."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": value.detach().cpu().numpy().copy()
        for number, entries in state.items()
        for name, value in entries.items()
    }


def load_optimizer_(optimizer: torch.optim.Optimizer, arrays: Mapping[str, np.ndarray]) -> None:
    """Put back what `optimizer_arrays` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = torch.from_numpy(array.copy())
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
