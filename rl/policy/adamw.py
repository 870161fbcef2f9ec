"""AdamW whose moments may be bfloat16 beside float32 masters, as DeepSeek-V3 keeps them (report, section 3.3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW in float32, operation by operation; between steps its moments are rounded to `moments`.

    With float32 moments results are those of `torch.optim.AdamW(foreach=False)` bit for bit. With bfloat16 they take 4
    bytes a parameter instead of 8, and each step rounds one by at most 2^-9 of itself. The second moment must still be
    able to move: a step takes it (1 - β2) of the way, which rounding swallows if that is below 2^-9 of it, so β2 should
    be 0.99 or less.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        moments: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.moments)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.moments)
        state["step"] += 1
        (beta1, beta2), rate, steps = group["betas"], group["lr"], int(state["step"])
        first, second = state["exp_avg"].float(), state["exp_avg_sq"].float()  # themselves, where they are float32
        parameter.mul_(1 - rate * group["weight_decay"])
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction1, correction2 = 1 - beta1**steps, 1 - beta2**steps
        denominator = (second.sqrt() / correction2**0.5).add_(group["eps"])
        parameter.addcdiv_(first, denominator, value=-rate / correction1)
        if self.moments != torch.float32:
            state["exp_avg"].copy_(first)
            state["exp_avg_sq"].copy_(second)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer; torch then casts moments to the type of the parameters, and here they are cast back."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(self.moments)
