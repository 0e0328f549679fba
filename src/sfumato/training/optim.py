"""Optimisers of the trainer: AdamW, and Muon for the hidden matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sfumato.training.recipe import TrainOptions


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: all singular values of (..., rows, columns) pulled to about 1.

    Quintic Newton-Schulz iteration with the coefficients of Jordan's Muon (2024). Every step multiplies a matrix by a
    polynomial of its Gram matrix, with which it commutes; where the matrix is longer than it is wide the steps are
    taken among Gram matrices, and it is multiplied once.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    if x.shape[-1] > 1.5 * x.shape[-2]:
        gram, whole = x @ x.mT, identity
        for _ in range(steps):
            step = a * identity + b * gram + c * gram @ gram
            gram, whole = step @ gram @ step, step @ whole
        x = whole @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = (a * identity + b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """AdamW groups and Muon groups in one optimiser; a group says ``muon=True`` to be orthogonalised.

    Convolution kernels are seen as (out, in * kh * kw). The update is scaled by sqrt(max(1, rows / columns)), as in
    Jordan's original. A group's ``lr`` is absolute.
    """

    def __init__(self, groups: Iterable[dict], momentum: float = 0.95):
        super().__init__(
            groups, {"lr": 0.0, "momentum": momentum, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
        )

    @torch.no_grad()
    def step(self, closure=None):  # noqa: ANN001, ANN201 - the signature of torch.optim.Optimizer
        """One update from the gradients in place."""
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._muon(group, live)
            elif live:
                self._adamw(group, live)

    def _muon(self, group: dict, live: list[Tensor]) -> None:
        alike: dict[tuple[int, int], list[Tensor]] = {}  # matrices of one shape go through the iteration together
        for p in live:
            alike.setdefault((len(p), p[0].numel()), []).append(p)
        for (rows, columns), parameters in alike.items():
            updates = []
            for p in parameters:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                updates.append(p.grad.lerp(momentum, group["momentum"]).flatten(1).float())
            size = group["lr"] * max(1.0, rows / columns) ** 0.5
            for p, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape).to(p.dtype), alpha=-size)

    def _adamw(self, group: dict, live: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for p in live:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        adamw(
            live,
            [p.grad for p in live],
            [self.state[p]["exp_avg"] for p in live],
            [self.state[p]["exp_avg_sq"] for p in live],
            [],
            [self.state[p]["step"] for p in live],
            foreach=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def build_optimizer(
    modules: Mapping[str, nn.Module],
    options: TrainOptions,
    takes_muon: Callable[[str, Tensor], bool],
    rates: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """AdamW or Muon + AdamW over the trainable parameters of ``modules``; each group's ``lr`` is its peak.

    ``rates``: learning rates of modules as multiples of the others', where they differ. Weight decay acts on matrices
    and kernels only.
    """
    betas = (options.beta1, options.beta2)
    groups = []
    for name, module in modules.items():
        matrices: list[Tensor] = []
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        for key, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if options.optimizer == "muon" and takes_muon(f"{name}.{key}", parameter):
                matrices.append(parameter)
            else:
                (decayed if parameter.ndim >= 2 else plain).append(parameter)
        rate, decay = (rates or {}).get(name, 1.0), options.weight_decay
        groups += [
            {"params": matrices, "muon": True, "lr": rate * options.muon_lr, "weight_decay": decay},
            {"params": decayed, "muon": False, "lr": rate * options.lr, "weight_decay": decay, "betas": betas},
            {"params": plain, "muon": False, "lr": rate * options.lr, "weight_decay": 0.0, "betas": betas},
        ]
    return Muon([group for group in groups if group["params"]])
