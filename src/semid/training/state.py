"""Model and optimiser as flat arrays by name, which is what a checkpoint holds."""

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
    """Put back what `module_arrays` gave."""
    module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})


def optimizer_arrays(optimizer: torch.optim.Optimizer) -> Arrays:
    """Return the optimiser's state by parameter number and name; rates are the schedule's."""
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
