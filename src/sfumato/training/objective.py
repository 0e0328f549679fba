"""What the trainer needs to know about a model in training: the :class:`Objective` protocol.

An objective owns its modules and its data. The trainer owns optimiser, schedule, averaging, checkpoints and logs. To
add one: subclass :class:`Objective`, name it in ``OBJECTIVES`` below, write a recipe.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.errors import UnknownName
from sfumato.rng import hashed
from sfumato.training.recipe import Options, Recipe, parse

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from PIL.Image import Image

# key -> "module:class"; imported only when a recipe asks for it
OBJECTIVES: dict[str, str] = {
    "vae": "sfumato.zoo.objectives.vae:VAEObjective",
    "clip": "sfumato.zoo.objectives.clip:CLIPObjective",
    "noisy_clip": "sfumato.zoo.objectives.noisy_clip:NoisyCLIPObjective",
    "diffusion": "sfumato.zoo.objectives.diffusion:DiffusionObjective",
    "inpaint": "sfumato.zoo.objectives.inpaint:InpaintObjective",
    "flow": "sfumato.zoo.objectives.flow:FlowObjective",
    "judge": "sfumato.zoo.objectives.judge:JudgeObjective",
    "cnn": "sfumato.zoo.objectives.cnn:CNNObjective",
    "vit": "sfumato.zoo.objectives.vit:VitObjective",
    "detr": "sfumato.zoo.objectives.detr:DetrObjective",
    "vqa": "sfumato.zoo.objectives.vqa:VQAObjective",
}


def save_half(module: ModelMixin, folder: Path) -> None:
    """Writes a diffusers model to ``folder`` in float16; ``module`` itself stays as it is."""
    half = type(module).from_config(module.config).half()
    half.load_state_dict(module.state_dict())
    half.save_pretrained(folder)


@dataclass(frozen=True)
class Draw:
    """The randomness of one step. Everything drawn is a pure function of (seed, step, rank, stream name)."""

    seed: int
    step: int
    rank: int = 0
    world: int = 1

    def number(self, stream: str, *more: int) -> int:
        """A 63-bit seed for the named stream."""
        text = ":".join(map(str, (self.seed, self.step, self.rank, stream, *more)))
        return hashed(text)

    def generator(self, stream: str) -> torch.Generator:
        """A fresh CPU generator for the named stream."""
        return torch.Generator().manual_seed(self.number(stream))

    def indices(self, n: int, batch: int) -> Tensor:
        """This process's share of a batch of ``batch`` out of ``n`` samples, (b,) int64: epochs of a seeded shuffle."""
        place = torch.arange(self.step * batch + self.rank, (self.step + 1) * batch, self.world)
        out = torch.empty_like(place)
        for epoch in (place // n).unique().tolist():
            seed = Draw(self.seed, epoch).number("shuffle")
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
            chosen = place // n == epoch
            out[chosen] = order[place[chosen] % n]
        return out


class Objective:
    """A model in training. Subclasses set ``Model`` and ``Loss`` (their recipe sections) and the methods below.

    Life: ``__init__`` builds the modules from the recipe, seeded; ``setup(device)`` opens the data and
    moves the modules; then for every step ``loss(batch(draw), draw)``; now and then ``evaluate()``, ``grid()`` and
    ``export(folder)``, these three with the averaged weights in place and the modules in eval mode.
    """

    Model: ClassVar[type[Options]] = Options
    Loss: ClassVar[type[Options]] = Options

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.rates: dict[str, float] = {}  # learning rate of a module beside the others', 1 where it is not named
        self.model_options: Any = parse("model", self.Model, recipe.model)
        self.loss_options: Any = parse("loss", self.Loss, recipe.loss)
        self.device = torch.device("cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.modules = self.build()

    def build(self) -> dict[str, nn.Module]:
        """The trainable modules by name (called once, under a seeded global generator)."""
        raise NotImplementedError

    def setup(self, device: torch.device) -> None:
        """Opens the data and moves everything to ``device``; subclasses extend it."""
        self.device = device
        for module in self.modules.values():
            module.to(device)

    def batch(self, draw: Draw) -> dict[str, Tensor]:
        """The samples of one step for this process: a pure function of ``draw``."""
        raise NotImplementedError

    def loss(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise and named scalars for the log (detached)."""
        raise NotImplementedError

    def hidden(self, name: str, parameter: Tensor) -> bool:
        """Whether Muon may orthogonalise this parameter: matrices inside the network, not its ends."""
        ends = ("embed", "conv_in", "conv_out", "proj_out", "norm", "projection", "readout")
        return parameter.ndim in (2, 4) and not any(end in name for end in ends)

    def grid(self) -> Image | None:
        """A picture that shows the state of the training."""
        return None

    def evaluate(self) -> dict[str, float]:
        """Quality on held-out scenes, by name, for the log and the card."""
        return {}

    def measure(self) -> dict[str, float]:
        """Quality for the card, measured once at the end: :meth:`evaluate` and what is too slow for the log."""
        return self.evaluate()

    def export(self, folder: Path) -> dict[str, Any]:
        """Writes the model in its library's standard folder format; returns entries of the card (sampling defaults)."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Starts from the weights in an exported folder (``init_from``)."""
        raise NotImplementedError


def build_objective(recipe: Recipe) -> Objective:
    """The objective that ``recipe`` names, with its modules built."""
    if recipe.objective not in OBJECTIVES:
        raise UnknownName("objective", recipe.objective, OBJECTIVES)
    module, _, name = OBJECTIVES[recipe.objective].partition(":")
    return getattr(importlib.import_module(module), name)(recipe)
