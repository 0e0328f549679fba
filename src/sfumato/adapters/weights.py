"""Weights: parameters of a fine-tuned model in the place of a model's own, at any scale of the way to them.

W + scale (W' - W), for every parameter W' that the file holds: all of a network (a DreamBooth or an ordinary fine-tune)
or some (Custom Diffusion's keys and values; Kumari et al. 2023, arXiv 2212.04488). Scales beyond 1 exaggerate what the
fine-tune learned, scales below 0 take the opposite way; merging by differences as in webui and Ilharco et al. 2023
(arXiv 2212.04089).

    >>> generate(model, "a red cube", interventions=Weights(file="finetuned/unet", scale=0.7))
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor

from sfumato.adapters import weight_sets
from sfumato.adapters.base import Adapter, AdapterParams
from sfumato.adapters.naming import parameters_of_ldm
from sfumato.adapters.trainable import CROSS, matching
from sfumato.adapters.weight_sets import checked_parameter, parameter_like, swapped_weights
from sfumato.cards import Card, Field, register
from sfumato.errors import Conflict, NoMatch, nearest
from sfumato.models import Model
from sfumato.sampling import Run, Step

__all__ = ["Weights"]


@register
class Weights(Adapter):
    """Whole parameters of the denoiser or the text encoders, from a file."""

    CARD = Card(
        key="weights",
        title="Editing Models with Task Arithmetic",
        authors="Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi",
        year=2023,
        arxiv="2212.04089",
        verb="adapters",
        needs=(),
        defaults_from="scale 1: the fine-tuned model itself",
        cost="none per step; the memory of the changed weights",
        not_reproduced="finding scales on a validation set",
        summary="weights of a fine-tuned model, whole or in part, at any scale of the way to them",
        example="weights:file=example-weights,partial=true",
    )

    class Params(AdapterParams):
        scale: float = Field(
            default=1.0, description="share of the way from the model's weights to the file's; below 0 the other way"
        )
        partial: bool = Field(
            default=False, description="apply what fits even if some parameters of the file are not in the model"
        )

    kind = "weights"
    params: Params

    @classmethod
    def usual_bytes(cls, model: Model) -> int:
        """The keys and values of the text alone, as Custom Diffusion teaches them."""
        paths = matching(model, model.family.denoiser_name, CROSS)
        weights = [cast(Tensor, model.denoiser.get_submodule(path).weight) for path in paths]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def _attach(self, model: Model, scale: float, stack: ExitStack) -> None:
        weights = self.weights(model, scale)
        self._mine = {} if not scale else {
            component: (weight_sets.parameters_of(model.modules[component]), chosen)
            for component, chosen in weights.items()
        }  # fmt: skip
        if scale:
            stack.enter_context(swapped_weights(model.modules, weights))

    def weights(self, model: Model, scale: float | None = None) -> dict[str, weight_sets.Weights]:
        """Raises NoMatch where parameters of the file are missing in the model (all of them, with ``partial``) or, at a
        scale other than 0, equal the model's own; BadWeights for shapes that do not fit and numbers not finite."""
        from safetensors.torch import load_file

        scale = self.scale if scale is None else float(scale)
        state, found, missing = load_file(self.path), [], []
        for key in {key for held in self.contents.words.values() for key, _, _ in held.values()}:
            del state[key]  # those beside the weights are read by word
        own = {name: dict(network.named_parameters(remove_duplicate=False)) for name, network in model.modules.items()}
        shapes = {path.rpartition(".")[0]: tuple(p.shape) for path, p in own[model.family.denoiser_name].items()}
        renamed = parameters_of_ldm(state, shapes)
        for key in state:
            place = _place(renamed.get(key, key), own, model.family.denoiser_name)
            if place is None:
                missing.append(key)
            else:
                found.append((key, *place))
        if missing and not (self.params.partial and found):
            names = [f"{component}.{path}" for component, each in own.items() for path in each]
            close = ", ".join(nearest(missing[0], names)) or ", ".join(names[:3])
            way = " Give partial=true to apply the others." if found else ""
            raise NoMatch(
                f"{self.path} fits {len(found)} of {len(state)} parameters of {model.name}; it has no {missing[0]}. "
                f"The nearest: {close}.{way}"
            )
        out: dict[str, dict[str, Any]] = {}
        changed = False
        for key, component, path in found:
            base: Tensor = own[component][path]
            value = checked_parameter(str(self.path), path, state[key], base, model.name)
            changed = changed or not torch.equal(value, base)
            with torch.no_grad():
                value = value if scale == 1 else torch.lerp(base, value, scale)
            out.setdefault(component, {})[path] = parameter_like(base, value)
        if scale and not changed:
            raise NoMatch(f"{self.path} changes nothing: {model.name} has these very weights.")
        return dict(out)

    def start(self, run: Run) -> None:
        for other in run.parts:
            if isinstance(other, Weights) and other is not self and self.scale and other.scale:
                if shared := set(self.contents.entries) & set(other.contents.entries):
                    raise _conflict(min(shared))
        super().start(run)

    def after_predict(self, step: Step) -> None:
        for component, (slots, chosen) in self._mine.items():
            for path, parameter in chosen.items():
                module, name = slots[path]
                if module._parameters[name] is not parameter:
                    raise _conflict(f"{component}.{path}")
        if self._mine:
            self.mark(
                step, sites=[f"{component}.{path}" for component, (_, each) in self._mine.items() for path in each]
            )

    def on_text(self, run: Run, condition: Any) -> Any:
        return condition

    def finish(self, run: Run) -> None:
        self._mine = {}


def _conflict(path: str) -> Conflict:
    return Conflict(f"weights and another system both exchange {path}; only one set can be in place.")


def _place(key: str, own: dict[str, dict[str, Any]], denoiser: str) -> tuple[str, str] | None:
    """(component, path) of the parameter that a key means."""
    component, dot, path = key.partition(".")
    if component not in own or not dot:
        component, path = denoiser, key
    path = path.replace(".processor.", ".").replace("_custom_diffusion.", ".")
    for each in (path, path.removeprefix("text_model."), f"text_model.{path}"):
        if each in own.get(component, {}):
            return component, each
    return None
