"""Optimisers of the trainer: AdamW, and Muon for the hidden matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sfumato.training.recipe import TrainOptions


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: all singular values of (rows, columns) pulled to about 1.

    Quintic Newton-Schulz iteration with the coefficients of Jordan's Muon (2024). Every step multiplies the matrix by a
    polynomial of its Gram matrix, with which it commutes; so the steps are taken among small square matrices, and the
    matrix itself is multiplied once.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    gram = x @ x.T
    whole = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(steps):
        step = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal().add_(a)
        whole = step @ whole
        gram = step @ gram @ step
    x = whole @ x
    return x.T if tall else x


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
        for p in live:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            flat = p.grad.lerp(momentum, group["momentum"]).flatten(1)
            rows, columns = flat.shape
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(
                orthogonalise(flat.float()).view_as(p).to(p.dtype),
                alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5,
            )

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
