"""The content picture: its features at every step, and the prompt that it was made with."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sfumato import files, masks
from sfumato.errors import BadInput
from sfumato.hspace.tap import tapped
from sfumato.models import Layer
from sfumato.sampling import Intervention, Run, Step
from sfumato.sampling.intervention import Coverage


class FeatureRecord(Intervention):
    """Keeps the features of a layer at every step, per branch; changes nothing."""

    def __init__(self, layer: Layer):
        self.layer = layer
        self.activity = Coverage()
        self._features: dict[tuple[str, float], Tensor] = {}

    def start(self, run: Run) -> None:
        self._now: Step | None = None
        run.enter(tapped(run.model, self.layer, self._look))

    def before_predict(self, step: Step) -> None:
        self._now = step
        self.mark(step)

    def _look(self, h: Tensor) -> None:
        """Sees the step's own prediction; every U-Net of diffusers is called once for both branches."""
        if self._now is None:
            return
        names = self._now.branches
        for name, features in zip(names, h.detach().chunk(len(names)), strict=True):
            self._features[name, float(self._now.t)] = features
        self._now = None  # further calls of the step are for composed prompts, or refine an inversion

    def at(self, branch: str, t: float) -> Tensor:
        """The features (b ...) of a branch at the nearest timestep; of the conditional one where it has no other."""
        times = [time for name, time in self._features if name == branch]
        if not times:
            branch, times = "cond", [time for name, time in self._features if name == "cond"]
        return self._features[branch, min(times, key=lambda time: abs(time - t))]


def prompt_of(image: str) -> str:
    """The prompt that a picture's recipe holds; empty where it holds none."""
    if image.startswith(masks.EMBEDDED) or not Path(image).is_file():
        return ""
    try:
        recipe, _ = files.read_recipe(image)
    except BadInput:
        return ""
    return str(recipe.get("prompt") or "")
