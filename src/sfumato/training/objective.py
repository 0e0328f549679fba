"""What a training run needs to know about a model in training: the :class:`Objective`.

An objective owns its modules and its data; the run owns optimisers, schedule, averages, checkpoints and logs. To add
one, write a file in ``zoo/objectives`` with a subclass that says ``NAME = "..."``, and a recipe that names it.
"""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato import cards, protocol, valid, writing
from sfumato.errors import BadInput, SfumatoError, UnknownName, within_memory
from sfumato.training import data
from sfumato.training.draw import Draw
from sfumato.training.players import Loss
from sfumato.training.recipe import Recipe, Section, parse

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PlayerLoss:
    """What one player of an objective does: minimises ``loss(batch, draw)`` over the modules named (all, if none are),
    at every so many-th step."""

    loss: Loss
    modules: Sequence[str] = ()
    every: int = 1


class Objective:
    """A model in training. Subclasses set ``NAME``, ``Model`` and ``Loss`` (their recipe sections) and the methods
    below.

    Life: ``__init__`` builds the modules from the recipe, seeded; ``setup(device)`` opens the data and
    moves the modules; then for every step ``loss(batch(draw), draw)``; now and then ``evaluate()``, ``grid()`` and
    ``export(folder)``, these three with the averaged weights in place and the modules in eval mode.
    """

    NAME: ClassVar[str] = ""
    Model: ClassVar[type[Section]] = Section
    Loss: ClassVar[type[Section]] = Section
    EXPORTED: ClassVar[str] = ""  # the module that is exported and loaded, a model of diffusers or transformers

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
        """Moves everything to ``device`` and opens the data; subclasses extend it."""
        self.device = device
        for module in self.modules.values():
            module.to(device)
        self.open_data()

    def open_data(self) -> None:
        """Opens the recipe's data as ``train_data`` and ``val_data``."""
        self.train_data: Any = data.dataset("train", self.recipe.data)
        self.val_data: Any = data.dataset("val", self.recipe.data)

    def batch(self, draw: Draw) -> dict[str, Tensor]:
        """The samples of one step for this process: a pure function of ``draw``."""
        raise NotImplementedError

    def loss(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise and named scalars for the log (detached)."""
        raise NotImplementedError

    def players(self) -> dict[str, PlayerLoss]:
        """The players by name, in the order of their turns: one that trains everything with :meth:`loss`. An objective
        with an adversary gives two, each with its own loss and modules."""
        return {"model": PlayerLoss(self.loss)}

    def takes_muon(self, name: str, parameter: Tensor) -> bool:
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

    def processors(self) -> list[Any]:
        """What is saved beside the exported model: tokenizer, image processor."""
        return []

    def export(self, folder: Path) -> dict[str, Any]:
        """Writes the model in its library's standard folder format; returns entries of the card (sampling defaults)."""
        module: Any = self.modules[self.EXPORTED]
        save_half(module, folder)
        for part in self.processors():
            part.save_pretrained(folder)
        return {}

    def load(self, folder: Path) -> None:
        """Starts from the weights in an exported folder (``init_from``)."""
        module = self.modules[self.EXPORTED]
        module.load_state_dict(weights_in(folder, type(module)))


def save_half(module: Any, folder: Path) -> None:
    """Writes a model of diffusers or transformers to ``folder`` in float16; ``module`` itself stays as it is. Its
    configuration says float32: transformers computes in what it says, diffusers in float32 in any case, and the parts
    of a pipeline must agree."""
    make = getattr(type(module), "from_config", type(module))  # transformers makes models from a config directly
    half = make(module.config).half()
    half.load_state_dict(module.state_dict())
    half.save_pretrained(folder)
    said = valid.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "dtype" in said:
        writing.write_text(folder / "config.json", valid.json_text({**said, "dtype": "float32"}, indent=2) + "\n")


def save_halves(pipeline: Any, folder: Path) -> None:
    """Writes a pipeline of diffusers to ``folder``, its models in float16."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            save_half(part, folder / name)
        elif part is not None:
            part.save_pretrained(folder / name)


def weights_in(folder: Path, kind: type[nn.Module], **where: str) -> dict[str, Tensor]:
    """The weights of a ``kind`` of model in an exported folder, in float32."""
    name = "dtype" if kind.__module__.startswith("transformers.") else "torch_dtype"
    return kind.from_pretrained(folder, **where, **{name: torch.float32}).state_dict()  # type: ignore[attr-defined]


@functools.cache
def objectives() -> dict[str, str]:
    """The objectives of this package: name -> "module:class". Read from the source text; nothing is imported."""
    package = Path(__file__).parent.parent
    found = {}
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "Objective)" not in source:
            continue
        module = ".".join(("sfumato", *path.relative_to(package).with_suffix("").parts))
        for node in ast.parse(source).body:
            for line in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(line, ast.Assign) and getattr(line.targets[0], "id", "") == "NAME":
                    found[str(ast.literal_eval(line.value))] = f"{module}:{getattr(node, 'name', '')}"
    return found


LARGEST = 2**17  # of a recipe's numbers about a network: channels, tokens


def _refuse_sizes(section: dict[str, Any]) -> None:
    """Raises BadInput for numbers that no layer has: torch builds layers of no channels, and fills memory with some."""
    for name, value in section.items():
        least = 1 if "channels" in name or "dim" in name or "width" in name else None
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int) and (number > LARGEST or (least is not None and number < least)):
                raise BadInput(f"recipe key model.{name}: {number} must be from {least or 0} to {LARGEST}.")


def build_objective(recipe: Recipe) -> Objective:
    """The objective that ``recipe`` names, with its modules built: one of :func:`objectives`, or that of a system which
    trains (:class:`sfumato.protocol.Trains`)."""
    if recipe.objective not in objectives():
        system: Any = cards.method(recipe.objective) if recipe.objective in cards.methods() else None
        if system is None or "train" not in protocol.serves(system):
            raise UnknownName("objective", recipe.objective, objectives())
        return system.objective(recipe)
    module, _, name = objectives()[recipe.objective].partition(":")
    build = getattr(importlib.import_module(module), name)
    _refuse_sizes(recipe.model)
    try:
        with within_memory(f"the model of recipe {recipe.name}", "make it smaller (recipe section model)"):
            return build(recipe)
    except SfumatoError:
        raise
    except Exception as error:  # layers of torch, diffusers and transformers refuse what does not fit in many ways
        why = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise BadInput(f"recipe section model: no network can be built of it: {why}.") from error
