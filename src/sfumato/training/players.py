"""A player: what one optimizer minimises, and when it has its turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import BadInput

#: The scalar to minimise, alone or with named scalars for the log.
Loss = Callable[..., Tensor | tuple[Tensor, dict[str, Tensor]]]


class Player:
    """Networks or tensors that learn by one optimizer from one loss. Several players of a trainer have their turns one
    after another in every step; none of them changes what belongs to another.

    Args:
        loss: called with the step's batch and its :class:`~sfumato.training.draw.Draw`, or with the draw alone where
            the trainer has no data; returns a scalar, or a scalar and a dict of scalars for the log. The modes of
            networks (train, eval) are the caller's.
        optimizer: any of torch's, over the parameters that are to learn.
        modules: the networks that these parameters belong to, one or several by name: gives parameters their names, and
            checkpoints the networks' buffers. Left out where tensors are optimised.
        name: in logs and checkpoints.
        schedule: share of each group's learning rate at a step (from 0); with an optimizer of ``lr=1`` the learning
            rate itself.
        clip: largest norm of all gradients together.
        every: has its turn at every so many-th step.
        ema: decay of an exponential moving average of the parameters; 0 keeps none.
    """

    def __init__(
        self,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        modules: nn.Module | Mapping[str, nn.Module] | None = None,
        *,
        name: str = "model",
        schedule: Callable[[int], float] | None = None,
        clip: float | None = None,
        every: int = 1,
        ema: float = 0.0,
    ):
        if not name.isidentifier():
            raise BadInput(f"name of a player is {name!r}; it must be a word, such as critic.")
        if every < 1 or not 0 <= ema < 1:
            raise BadInput(f"player {name} has every={every} and ema={ema:g}; at least 1, and from 0 to below 1.")
        self.loss, self.optimizer, self.name = loss, optimizer, name
        self.schedule, self.clip, self.every, self.ema = schedule, clip, every, ema
        self.modules = {name: modules} if isinstance(modules, nn.Module) else dict(modules or {})
        owned = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        self.parameters: dict[str, Tensor] = {}
        for part, module in self.modules.items():
            for key, parameter in module.named_parameters():
                if owned.pop(id(parameter), None) is not None:
                    self.parameters[f"{part}.{key}"] = parameter
        self.loose = {f"{name}.tensor{i}": parameter for i, parameter in enumerate(owned.values())}
        self.parameters |= self.loose
        self.average = {key: p.detach().clone() for key, p in self.parameters.items()} if ema else {}
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        optimizer.zero_grad(set_to_none=True)

    def update(self, step: int, samples: Sequence[tuple[Any, ...]], backward: Callable[..., None]) -> dict[str, Tensor]:
        """One update from the loss's mean over ``samples``, the arguments of its calls; returns scalars for the log."""
        logs: dict[str, Tensor] = {}
        if self.schedule is not None:
            share = self.schedule(step)
            for group in self.optimizer.param_groups:
                group["lr"] = share * group["initial_lr"]
            logs["rate"] = torch.tensor(share)
        parameters = list(self.parameters.values())
        try:
            for arguments in samples:
                found = self.loss(*arguments)
                loss, more = found if isinstance(found, tuple) else (found, {})
                backward(loss / len(samples), inputs=parameters)
                for key, value in {"loss": loss.detach(), **more}.items():
                    logs[key] = logs.get(key, 0) + value / len(samples)
            if self.clip is not None:
                logs["norm"] = nn.utils.clip_grad_norm_(parameters, self.clip)
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            turns = step // self.every + 1
            weight = max(1 - self.ema, 9 / (9 + turns))  # a young average follows more closely
            values = [p.detach() for p in parameters]
            torch._foreach_lerp_(list(self.average.values()), values, weight)
        return logs

    @torch.no_grad()
    def take_average(self) -> None:
        """Puts the averaged values in the place of the parameters, for good."""
        for key, value in self.average.items():
            self.parameters[key].copy_(value)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within: the averaged parameters, networks in eval mode, no gradients. Afterwards everything is as it was."""
        with torch.no_grad():
            live = {key: self.parameters[key].detach().clone() for key in self.average}
            modes = [(each, each.training) for module in self.modules.values() for each in module.modules()]
            self.take_average()
            try:
                for module in self.modules.values():
                    module.eval()
                yield
            finally:
                for key, value in live.items():
                    self.parameters[key].copy_(value)
                for each, training in modes:
                    each.training = training

    # what a checkpoint holds ------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """Copies of everything the next turn depends on, by name."""
        found = {f"weights.{part}.{k}": v for part, m in self.modules.items() for k, v in m.state_dict().items()}
        found |= {f"weights.{key}": p for key, p in self.loose.items()}
        found |= {f"average.{key}": value for key, value in self.average.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"moments.{self.name}.{index}.{key}": value for key, value in state.items()}
        return {key: value.detach().cpu().clone() for key, value in found.items()}  # tied weights may share memory

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the state that :meth:`tensors` gave. Raises KeyError, RuntimeError where it does not fit."""
        for part, module in self.modules.items():
            head = f"weights.{part}."
            module.load_state_dict({k[len(head) :]: v for k, v in tensors.items() if k.startswith(head)})
        for key, parameter in self.loose.items():
            parameter.copy_(tensors[f"weights.{key}"])
        for key, value in self.average.items():
            value.copy_(tensors[f"average.{key}"])
        packed = self.optimizer.state_dict()
        packed["state"], head = {}, f"moments.{self.name}."
        for key, value in tensors.items():
            if key.startswith(head):
                index, entry = key[len(head) :].split(".", 1)
                packed["state"].setdefault(int(index), {})[entry] = value
        self.optimizer.load_state_dict(packed)
