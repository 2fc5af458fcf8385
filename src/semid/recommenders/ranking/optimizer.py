"""Adam for ranking models: a rate of their own for code tables, row-wise updates for large ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from semid.recommenders.ranking.network import RankingNetwork
from semid.training.options import TrainOptions

__all__ = ["RowwiseAdamW", "make_optimizer"]


class RowwiseAdamW(torch.optim.AdamW):
    """AdamW whose parameters with sparse gradients change only in the rows of the batch.

    Moments of a row stand still while the row does not occur ("lazy" Adam, as in
    `torch.optim.SparseAdam`), and so does its decay; the bias correction counts all steps. Dense
    parameters are updated by the fused AdamW.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._rows(parameter, group)
                    parameter.grad = None
        return super().step(closure)

    def _rows(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step = float(state["step"])
        beta1, beta2 = group["betas"]
        rate = float(group["lr"])
        mean = state["exp_avg"][rows].mul_(beta1).add_(values, alpha=1 - beta1)
        square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(values, values, value=1 - beta2)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        scale = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        kept = parameter[rows]
        if group["weight_decay"]:
            kept.mul_(1 - rate * group["weight_decay"])
        parameter[rows] = kept.addcdiv_(mean, scale, value=-rate / (1 - beta1**step))


def make_optimizer(
    network: RankingNetwork,
    options: TrainOptions,
    *,
    code_rate: float = 1.0,
    code_decay: float | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer of a network.

    Args:
        network: what is trained.
        options: rate and decay.
        code_rate: rate of the code tables as a multiple of the others'.
        code_decay: their decay; None takes the others'.
    """
    codes = [
        tables.codes
        for tables in (network.tables, network.first)
        if tables is not None and tables.codes is not None
    ]
    own = {id(parameter) for parameter in codes}
    others = [p for p in network.parameters() if p.requires_grad and id(p) not in own]
    groups: list[dict[str, Any]] = [{"params": others}]
    if codes:
        decay = options.weight_decay if code_decay is None else code_decay
        groups.append({"params": codes, "weight_decay": decay, "rate": code_rate})
    kind = RowwiseAdamW if network.sparse else torch.optim.AdamW
    return kind(groups, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True)
