"""Expert denoisers: several sets of weights for one network, each for the noise levels it was trained on.

At high noise the layout comes from the words, at low noise the detail comes from what is there already; one set of
weights has to do both. So the noise levels are halved, a child of the model is trained further on each half, perhaps
halved again: a binary tree, of which only leaves are used (Balaji et al. 2022, eDiff-I, the section on the ensemble of
expert denoisers). Each step is taken by one of them, so a picture costs what it cost before.

    >>> generate(model, "a red cube and a blue ball", interventions=Experts())  # all that were trained from this model

An expert is an ordinary model, trained by a recipe that starts from its parent and names its share of the noise
(``init_from``, ``loss.interval``), such as ``sfumato train toy-sd-expert-1-0``. Where experts lie within each other the
narrowest acts; where there is none, the model itself does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import cards, registry, valid
from sfumato.adapters.weight_sets import Weights, WeightSets, checked_parameter, parameter_like, read_weights
from sfumato.cards import Card, Field, ModelPath, register
from sfumato.errors import BadInput, BadWeights, Conflict, NoMatch, UnknownName
from sfumato.models import Model
from sfumato.sampling import Intervention, Run, Step

__all__ = ["Expert", "Experts"]


@dataclass(frozen=True, eq=False)
class Expert:
    """Weights of the denoiser for timesteps from the first of ``interval`` to below its second."""

    name: str
    interval: tuple[float, float]
    weights: Weights

    def covers(self, t: float) -> bool:
        return self.interval[0] <= t < self.interval[1]


@register
class Experts(Intervention):
    """Exchanges the denoiser's weights by noise level, in every call of the denoiser, other systems' included."""

    CARD = Card(
        key="experts",
        title="eDiff-I: an ensemble of expert denoisers",
        authors="Balaji, Nah, Huang, Vahdat, Song, Zhang, Kreis, Aittala, Aila, Laine, Catanzaro, Karras, Liu",
        year=2022,
        arxiv="2211.01324",
        verb="steer",
        needs=("noise_path",),
        defaults_from="the paper: children of one model, intervals of equal probability, one expert per step",
        cost="none per step; the memory of each expert's weights",
        not_reproduced="the image embedding as style reference waits for a model conditioned on one; T5 beside CLIP "
        "and the two upsamplers are no part of the built-in models",
        summary="a set of weights for each range of noise levels, at the cost of one",
    )

    class Params(cards.Params):
        models: list[ModelPath] = Field(
            default=[],
            description="the experts: built-in models, finished training runs or folders; none: all that were trained "
            "from the model in use",
        )
        timesteps: list[tuple[float, float]] = Field(
            default=[],
            description="first|last timestep of each, the last not included; none: as their cards say",
            json_schema_extra={"unit": "timestep"},
        )
        strength: float = Field(
            default=1.0, ge=0, le=1, description="share of the way from the model's own weights to the experts'"
        )

    role = "adapter"

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        p = self.params
        if p.timesteps and len(p.timesteps) != len(p.models):
            raise BadInput(
                f"timesteps of experts has {len(p.timesteps)} intervals for {len(p.models)} models; give one each."
            )
        wrong = [each for each in p.timesteps if not 0 <= each[0] < each[1]]
        if wrong:
            raise BadInput(f"timesteps of experts has {wrong[0]}; an interval is a start from 0 and an end above it.")
        self.experts: list[Expert] = []

    @property
    def resolved(self) -> Params:
        """The parameters with the models that were found where none was named: a recipe names them."""
        return self.params.model_copy(update={"models": [expert.name for expert in self.experts] or self.params.models})

    @classmethod
    def usual_bytes(cls, model: Model) -> int:
        """Two, as of the first halving of the noise levels."""
        return 2 * sum(p.numel() * p.element_size() for p in model.denoiser.parameters())

    def start(self, run: Run) -> None:
        """Reads the experts and attaches them. Raises NoMatch where there are none, UnknownName, BadInput and
        BadWeights for those that do not fit, Conflict where two share noise levels and neither lies within the other.
        """
        if sum(isinstance(part, Experts) for part in run.parts) > 1:
            raise Conflict("experts is given twice; name all models in one.")
        found = self._found(run.model.name)
        top = float(run.scheduler.config.get("num_train_timesteps", 1000))
        self.experts = []
        for i, (name, folder) in enumerate(found.items()):
            interval = self.params.timesteps[i] if self.params.timesteps else _interval(name, folder)
            ends = (interval[0], math.inf if interval[1] >= top else interval[1])
            self.experts.append(Expert(name, ends, self._weights(name, folder, run)))
        _refuse_overlaps(self.experts)
        if self.strength:
            sets = WeightSets(run.model.denoiser, {expert: expert.weights for expert in self.experts})
            run.defer(sets.use, None)
            run.enter(run.model.listening(lambda t: sets.use(self.at(t))))

    def before_predict(self, step: Step) -> None:
        if self.strength and self.at(step.t) is not None:
            self.mark(step)

    def at(self, t: Any) -> Expert | None:
        """The expert of a timestep, or of several that have the same one; None where the model itself acts. Raises
        Conflict for timesteps of different experts."""
        times = t.flatten().tolist() if isinstance(t, Tensor) else [t]
        chosen = {id(one): one for one in (self._at(float(time)) for time in times)}
        if len(chosen) > 1:
            raise Conflict("samples of one batch are at noise levels of different experts; run them one by one.")
        return next(iter(chosen.values()))

    def _at(self, t: float) -> Expert | None:
        covering = [expert for expert in self.experts if expert.covers(t)]
        return min(covering, key=lambda expert: expert.interval[1] - expert.interval[0], default=None)

    # -- reading -------------------------------------------------------------------------------------------------------

    def _found(self, model: str) -> dict[str, Path]:
        """Names and folders of the experts."""
        known: dict[str, Path] = {**registry.trained(), **{name: registry.folder() / name for name in registry.names()}}
        if not self.params.models:
            found = {name: folder for name, folder in known.items() if _card(folder).get("of") == model}
            if not found:
                recipes = [name for name in registry.recipes() if name.startswith(f"{model}-expert")]
                how = f"sfumato train {recipes[0]}" if recipes else "init_from and loss.interval in a recipe"
                raise NoMatch(f"no expert was trained from {model} yet; train some ({how}) or name folders in models.")
            return found
        found = {}
        for name in self.params.models:
            folder = known.get(name, Path(name))
            if not folder.is_dir():
                raise UnknownName("expert", name, [each for each in known if _card(known[each])])
            if name in found:
                raise BadInput(f"models of experts names {name} twice.")
            found[name] = folder
        return found

    @torch.no_grad()
    def _weights(self, name: str, folder: Path, run: Run) -> Weights:
        """The parameters of an expert, in the model's precision; ``strength`` of the way to them."""
        denoiser, component = run.model.denoiser, run.model.family.denoiser_name
        if not (folder / component).is_dir():
            raise BadInput(f"expert {name} has no {component}, so it is no expert of {run.model.name}.")
        state, weights = read_weights(folder / component), {}
        for path, base in denoiser.named_parameters(remove_duplicate=False):
            value = checked_parameter(f"expert {name}", path, state.get(path), base, run.model.name)
            if self.strength < 1:
                value = torch.lerp(base.detach(), value, self.strength)
            weights[path] = parameter_like(base, value)
        for path, buffer in denoiser.named_buffers():
            if path in state and not torch.allclose(state[path].to(buffer), buffer, atol=1e-3):
                raise BadWeights(f"expert {name} has another {path}: it is no child of {run.model.name}.")
        return weights


def _card(folder: Path) -> dict[str, Any]:
    """What a model's card says of it as an expert; nothing where it is none."""
    try:
        entry = valid.loads((folder / "sfumato.json").read_text(encoding="utf-8")).get("expert")
    except (OSError, ValueError, AttributeError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _interval(name: str, folder: Path) -> tuple[float, float]:
    try:
        low, high = (float(each) for each in _card(folder)["timesteps"])
    except (KeyError, TypeError, ValueError):
        raise BadInput(
            f"the card of {name} names no timesteps, so it is no expert; give timesteps=[first|last] for each model."
        ) from None
    return low, high


def _refuse_overlaps(experts: Sequence[Expert]) -> None:
    for i, one in enumerate(experts):
        for other in experts[i + 1 :]:
            (a, b), (c, d) = one.interval, other.interval
            within = (a <= c and d <= b) or (c <= a and b <= d)
            if a < d and c < b and ((a, b) == (c, d) or not within):
                raise Conflict(
                    f"experts {one.name} and {other.name} both claim timesteps from {max(a, c):g} to "
                    f"{min(b, d):g}; leave one of them out."
                )
