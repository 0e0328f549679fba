"""Null-text inversion: the noise of an existing picture, and the unconditional text per step that leads back to it.

Mokady et al. 2022 (arXiv 2211.09794), section 3. Inversion with guidance 1 gives a trajectory, the *pivot*; sampling
from its noise with real guidance leaves it. So at every step, from noise to picture, the embedding of the empty prompt
is optimised until the guided step lands on the pivot again. Prompt and weights stay as they are, therefore the picture
can be edited by its words afterwards.

    >>> trajectory = invert(model, picture, "a cat on a sofa", steps=50)
    >>> null = null_text(model, trajectory, guidance=7.5)
    >>> again = generate(model, "a cat on a sofa", guidance=7.5, interventions=null, **trajectory.settings)

The guided step is linear in the network's output, x' = A x + B out, whatever that predicts: noise, velocity
(Stable Diffusion 2) or flow. So the same optimisation serves flow models, with the Euler path of the probability flow
for a pivot. They hear the text through its pooled vector as much as token by token, and at any scale: both are
optimised, at a rate in units of each one's own root mean square, ten times the paper's. A guidance-distilled model
(Flux) has no unconditional branch to optimise unless true guidance is added; its plain inversion needs none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato import files
from sfumato.errors import BadInput
from sfumato.models import Condition, Model
from sfumato.sampling import Guidance, Intervention, Step, Trajectory
from sfumato.sampling.intervention import Coverage
from sfumato.sampling.inversion import step_coefficients
from sfumato.sampling.loop import open_run
from sfumato.sampling.request import checked_int, checked_request

__all__ = ["NullText", "null_text"]

FORMAT = "sfumato-null-text-1"


class NullText(Intervention):
    """Gives every step its own unconditional text. ``embeds`` (T t d): one per step of the schedule, for all samples;
    ``pooled`` (T d), where that was optimised too; ``losses`` (T): squared distance to the pivot that was left, mean
    over the latents."""

    role = "conditioner"

    def __init__(
        self,
        embeds: Tensor,
        losses: Tensor | None = None,
        facts: dict[str, Any] | None = None,
        pooled: Tensor | None = None,
    ):
        if embeds.dim() != 3:
            raise BadInput(f"embeds of null-text have shape {tuple(embeds.shape)}; expected (T t d), one per step.")
        self.embeds, self.pooled, self.facts = embeds, pooled, facts or {}
        self.losses = torch.zeros(len(embeds)) if losses is None else losses
        self.activity = Coverage()

    @property
    def name(self) -> str:
        return "null_text"

    @property
    def text(self) -> dict[str, Tensor]:
        """What was optimised, by its key in a condition."""
        return {"embeds": self.embeds} if self.pooled is None else {"embeds": self.embeds, "pooled": self.pooled}

    def before_predict(self, step: Step) -> None:
        if "uncond" not in step.branches:
            return
        uncond = step.condition.uncond
        assert uncond is not None
        own = uncond["embeds"]
        if step.total != len(self.embeds) or own.shape[1:] != self.embeds.shape[1:]:
            raise BadInput(
                f"null-text embeddings are for {len(self.embeds)} steps of {tuple(self.embeds.shape[1:])}; "
                f"this run has {step.total} of {tuple(own.shape[1:])}."
            )
        rows = {name: each[step.i].to(uncond[name]).expand_as(uncond[name]) for name, each in self.text.items()}
        step.condition = _with_uncond(step.condition, rows)
        self.mark(step)

    def save(self, path: Path | str) -> Path:
        """Write the embeddings as safetensors, whole or not at all."""
        metadata = {"format": FORMAT, "facts": json.dumps(self.facts, ensure_ascii=False)}
        return files.save_tensors(path, {**self.text, "losses": self.losses}, metadata)

    @classmethod
    def load(cls, path: Path | str) -> NullText:
        """What :meth:`save` wrote. Raises BadInput for any other file, OSError when it cannot be read."""
        with files.reading_tensors(path, FORMAT, "null-text embeddings") as (file, metadata):
            embeds, losses = file.get_tensor("embeds"), file.get_tensor("losses")
            pooled = file.get_tensor("pooled") if "pooled" in file.keys() else None  # noqa: SIM118 - not a dict
            return cls(embeds, losses, json.loads(metadata["facts"]), pooled)


def null_text(
    model: Model,
    trajectory: Trajectory,
    *,
    guidance: float | Guidance | None = None,
    inner: int = 10,
    learning_rate: float | None = None,
    tolerance: float = 1e-5,
    on_step: Callable[[Step], None] | None = None,
) -> NullText:
    """Unconditional embeddings with which sampling from ``trajectory.noise`` under ``guidance`` follows ``trajectory``,
    that of one picture.

    Per step at most ``inner`` iterations of Adam on the embedding, which begins as that of the step before; the
    learning rate falls from ``learning_rate`` (None: 1e-2, for flow models 0.1 of the embedding's root mean square) to
    half of it, and a step is left once its loss is below ``tolerance`` + 0.001 of progress (the original's
    1e-2 (1 - i/100) and 1e-5 + 2e-5 i at 50 steps). Of all embeddings tried in a step the best is kept, so that the
    loss cannot drift upwards as it does in the original, which keeps the last.

    Costs up to 2 + 3 ``inner`` forward-equivalents per step. Raises BadInput without guidance above 1 or for several
    pictures.
    """
    inner = checked_int(inner, "inner", 0)
    if trajectory.latents.shape[1] != 1:
        raise BadInput(f"null-text inversion takes one picture; this trajectory has {trajectory.latents.shape[1]}.")
    scale = model.defaults["guidance"] if guidance is None and not model.embeds_guidance else guidance
    scales: dict[str, Any] = {"true_guidance": scale} if model.embeds_guidance else {"guidance": scale}
    request = checked_request(model, trajectory.prompts, **scales, **trajectory.settings)
    if not request.guidance.on:
        raise BadInput("null-text inversion is for guidance above 1; without it plain inversion leads back already.")
    best, losses = [], []
    with open_run(model, request, range(1), ()) as run:
        run.freeze()
        assert run.condition is not None and run.condition.uncond is not None
        names = [name for name in ("embeds", "pooled") if name == "embeds" or model.flow]
        text = {name: run.condition.uncond[name].float() for name in names if name in run.condition.uncond}
        units = {name: float(each.square().mean().sqrt()) if model.flow else 1.0 for name, each in text.items()}
        relative = (0.1 if model.flow else 1e-2) if learning_rate is None else learning_rate
        rates = {name: relative * unit for name, unit in units.items()}
        pivot = trajectory.latents.to(run.model.device, run.model.state_dtype)
        x = pivot[0]
        for i in range(run.total):
            run.seek(i)
            step = Step(run, i, x)
            text, step.outputs, loss = _step(step, text, pivot[i + 1], inner, rates, tolerance)
            best.append({name: each[0].to(run.model.dtype) for name, each in text.items()})
            losses.append(loss)
            x = step.x = run.advance(step)
            if on_step is not None:
                on_step(step)
    facts = {
        "model": model.name,
        "prompt": trajectory.prompts[0],
        "guidance": float(request.guidance.scale),
        "inner": inner,
    }
    found = {name: torch.stack([each[name] for each in best]) for name in text}
    return NullText(found["embeds"], torch.tensor(losses), facts, found.get("pooled"))


def _step(
    step: Step, text: dict[str, Tensor], target: Tensor, inner: int, rates: dict[str, float], tolerance: float
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """(parts of the text (1 ...), outputs per branch, loss) of one step that is to lead from ``step.x`` to
    ``target``.

    A loop of its own: it evaluates before it updates, leaves without an update once the loss is small, keeps the best
    of what it tried together with its outputs, and counts the cost of each gradient.
    """
    run, start = step.run, step.condition
    cond = run.denoise(step.x, step.t, start, ("cond",), (), step)
    if "uncond" not in step.branches:  # guidance does not cover this step
        return text, cond, 0.0
    a, b = step_coefficients(run, step)
    variables = {name: each.detach().clone().requires_grad_(True) for name, each in text.items()}
    groups = [{"params": [each], "lr": rates[name] * (1 - step.progress / 2)} for name, each in variables.items()]
    optimizer = torch.optim.Adam(groups)
    best = (text, cond, float("inf"))
    for k in range(inner + 1):
        with torch.set_grad_enabled(k < inner):
            condition = _with_uncond(start, {name: each.to(step.x.dtype) for name, each in variables.items()})
            outputs = run.denoise(step.x, step.t, condition, ("uncond",), (), step) | cond
            loss = F.mse_loss((a * step.x + b * run.combined(outputs)).float(), target.float())
        if loss.item() < best[2]:
            tried = {name: each.detach().clone() for name, each in variables.items()}
            best = tried, {name: out.detach() for name, out in outputs.items()}, loss.item()
        if k == inner or loss.item() < tolerance + 1e-3 * step.progress:
            break
        gradients = torch.autograd.grad(loss, list(variables.values()))
        for variable, gradient in zip(variables.values(), gradients, strict=True):
            variable.grad = gradient
        run.add_cost(1.0, step)
        optimizer.step()
    return best


def _with_uncond(condition: Condition, text: dict[str, Tensor]) -> Condition:
    assert condition.uncond is not None
    return replace(condition, uncond={**condition.uncond, **text})
