"""LoRA: low-rank changes of a model's weights, from files of every dialect.

Hu et al. 2021 (arXiv 2106.09685): W + scale * alpha / r * B A, for some modules of the denoiser and of the text
encoders; with DoRA, LoHa and LoKr by the same file formats (:data:`~sfumato.adapters.layers.ALGEBRAS`). Read are the
dialects of peft, diffusers (today's and its two older ones), kohya (A1111, ComfyUI, Civitai), LyCORIS, and the names of
LDM, SGM, SD3's and Flux's own code.

    >>> generate(model, "a red cube", interventions=[LoRA(file="x.safetensors", scale=0.8)])

A module of the file that the model does not have is an error, unless ``partial`` says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sfumato import files
from sfumato.adapters.base import Adapter, AdapterParams
from sfumato.adapters.formats import Contents, fit
from sfumato.adapters.layers import AdaptedModule, adapt_module, device_of, with_rows
from sfumato.adapters.naming import Place
from sfumato.adapters.spelling import published_path
from sfumato.adapters.trainable import ATTENTION, matching
from sfumato.adapters.weight_sets import Weights, at_hand, parameter_like, refuse_codes
from sfumato.cards import Card, Field, register
from sfumato.errors import BadWeights, NoMatch, NotSupported, nearest
from sfumato.models import Model
from sfumato.sampling import Run

__all__ = ["LoRA", "index_of", "save_lora"]


def index_of(model: Model) -> dict[str, dict[str, tuple[int, ...]]]:
    """Component -> path -> shape of the weight of every linear map and convolution of denoiser and text encoders."""
    family = model.family.denoiser_name
    return {
        component: {
            path: _shape(module)
            for path, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        for component, network in model.modules.items()
        if component == family or component.startswith("text_encoder")
    }


def _shape(module: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    """Of the weight, which quantizers of linear maps pack."""
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else tuple(module.weight.shape)


@register
class LoRA(Adapter):
    """A low-rank adapter of denoiser and text encoders, from a file."""

    CARD = Card(
        key="lora",
        title="LoRA: Low-Rank Adaptation of Large Language Models",
        authors="Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen",
        year=2021,
        arxiv="2106.09685",
        verb="adapters",
        needs=(),
        defaults_from="the file: ranks and alphas; scale 1 as in diffusers, webui and ComfyUI",
        cost="two small matrices per adapted module and call",
        not_reproduced="GLoRA, OFT, (IA)^3 and full differences in LyCORIS files are named and refused",
        summary="a trained low-rank change of the weights, from a file of any dialect, at any scale",
        example="lora:file=example-lora,partial=true",
    )

    class Params(AdapterParams):
        partial: bool = Field(
            default=False, description="apply what fits even if some modules of the file are not in the model"
        )

    kind = "lora"
    params: Params

    def __init__(self, **given: Any):
        super().__init__(**given)
        # layers by model: putting them together again for every batch takes a second for 700 modules
        self._known: WeakKeyDictionary[Model, dict[str, AdaptedModule]] = WeakKeyDictionary()
        self._changed: dict[str, Tensor] = {}  # by module: whether its first output in this run was another

    @classmethod
    def usual_bytes(cls, model: Model) -> int:
        """Of rank 4 at the projections of every attention, as training scripts make them."""
        denoiser = model.family.denoiser_name
        shapes = index_of(model)[denoiser]
        held = sum(4 * (shapes[path][0] + math.prod(shapes[path][1:])) for path in matching(model, denoiser, ATTENTION))
        return held * model.dtype.itemsize

    def _attach(self, model: Model, scale: float, stack: ExitStack) -> None:
        for name, adapted in self.adapted(model).items():
            if scale:
                hook = adapted.module.register_forward_hook(self._hook(name, adapted, scale))
                stack.callback(hook.remove)

    def _hook(self, name: str, adapted: AdaptedModule, scale: float) -> Callable[..., Tensor]:
        def add(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            self.acted(name)
            out = adapted.added(args[0], output, scale)
            if name not in self._changed:
                self._changed[name] = (out != output).any()
            return out

        return add

    def adapted(self, model: Model) -> dict[str, AdaptedModule]:
        """Every module that the file adapts, by ``component.path``.

        Raises NoMatch where modules of the file are missing in the model (all of them, with ``partial``) or the file
        changes nothing, BadWeights for shapes that do not fit and numbers that are not finite, NotSupported for an
        algebra that is not supported.
        """
        known = self._known.get(model)
        if known is None or not all(_holds(model, name, each) for name, each in known.items()):
            known = self._known[model] = self._adapted(model)
        return dict(known)

    def _adapted(self, model: Model) -> dict[str, AdaptedModule]:
        found = fit(self.contents.modules, index_of(model))
        self._check(model, found)
        tensors = self._read()
        out: dict[str, AdaptedModule] = {}
        for module, places in found.found:
            parts = {part: tensors[key] for part, key in module.keys.items() if part != "alpha"}
            scaling = self.contents.scaling(module, places[0].component, places[0].path, tensors)
            for place in places:
                own = _rows(parts, place, f"{module}")
                network = model.modules[place.component].get_submodule(place.path)
                out[str(place)] = adapt_module(network, own, scaling, str(place))
        if not any(_acts(each) for each in out.values()):
            raise NoMatch(f"{self.path} changes nothing: in every module one of its factors is all zeros.")
        return out

    def _check(self, model: Model, found: Any) -> None:
        if found.misshapen:
            module, place, shape = found.misshapen[0]
            more = f" (and {len(found.misshapen) - 1} more)" if len(found.misshapen) > 1 else ""
            made = f", and was made for {self.contents.base}" if self.contents.base else ""
            raise BadWeights(
                f"{self.path} does not fit {model.name}: {module.name} adapts a weight of {module.size}, and "
                f"{place} has {shape}{more}{made}."
            )
        if found.missing and (not self.params.partial or not found.found):
            first = found.missing[0]
            close = nearest(first.name, found.names)
            made = f" It was made for {self.contents.base}." if self.contents.base else ""
            candidates = ", ".join(close) or ", ".join(found.names[:6])
            way = "" if not found.found else " Give partial=true to apply the others."
            raise NoMatch(
                f"{self.path} fits {len(found.found)} of {found.total} modules of {model.name}; it has none for "
                f"{first.name}. The nearest: {candidates}.{made}{way}"
            )
        refuse_lost(self.contents, self.params.partial)

    def _read(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        tensors = load_file(self.path)
        for key, value in tensors.items():
            if not value.isfinite().all():
                raise BadWeights(f"{self.path}: {key} holds values that are no finite numbers; the file is damaged.")
        return tensors

    def weights(self, model: Model, scale: float | None = None) -> dict[str, Weights]:
        out: dict[str, dict[str, nn.Parameter]] = {}
        scale = self.scale if scale is None else float(scale)
        for name, adapted in self.adapted(model).items():
            component, _, path = name.partition(".")
            own = adapted.module.weight
            assert isinstance(own, Tensor)
            refuse_codes(name, own)
            at_hand(name, own)
            with torch.no_grad():
                out.setdefault(component, {})[f"{path}.weight"] = parameter_like(own, own + adapted.delta(scale))
        return dict(out)

    def save(self, path: str | Path) -> Path:
        """Writes the adapter's file anew, tensors and metadata as they are. Raises OSError."""
        return files.save_tensors(path, self._read(), self.contents.metadata or None)

    def finish(self, run: Run) -> None:
        if self.scale and not self.activity.calls:
            raise NoMatch(f"{self.path} was attached, but none of its modules was used in this run.")
        changed, self._changed = self._changed, {}
        if changed and not any(bool(each) for each in changed.values()):
            raise NoMatch(
                f"{self.path} changed the output of none of its {len(changed)} modules: at scale {self.scale:g} it is "
                f"too small for {str(run.model.dtype).removeprefix('torch.')}."
            )


def refuse_lost(held: Contents, partial: bool = False, way: str = " Give partial=true to leave them out.") -> None:
    """Raises NoMatch where a low-rank file holds tensors that are no part of one, unless with ``partial``, and
    NotSupported for lengths of columns (LyCORIS' wd_on_out=false), which peft's DoRA does not have: without them the
    file would be another adapter."""
    for module in held.modules:
        lengths = module.shapes.get("magnitude", ())
        if module.keys.get("magnitude", "").endswith(".dora_scale") and len(lengths) > 1 and lengths[0] < lengths[1]:
            raise NotSupported(f"{module} is a DoRA over columns (wd_on_out=false); only DoRA over rows is supported.")
    if held.rest and not partial:
        raise NoMatch(
            f"{held.path} also holds {len(held.rest)} tensors that are no part of a low-rank adapter, such as "
            f"{held.rest[0]}: without them it is another one.{way}"
        )


def _rows(parts: Mapping[str, Tensor], place: Place, name: str) -> dict[str, Tensor]:
    """A fused module's tensors as one of its parts has them."""
    if not place.rows:
        return dict(parts)
    if "up" not in parts:
        raise NotSupported(f"{name} is one module in the file and several in diffusers; only LoRA can be divided.")
    return with_rows(parts, place.rows)


def _holds(model: Model, name: str, adapted: AdaptedModule) -> bool:
    """Whether what was put together still stands beside the model's module, on its device and in its precision."""
    component, _, path = name.partition(".")
    weight, own = adapted.module.weight, next(iter(adapted.parameters().values()))
    same = model.modules[component].get_submodule(path) is adapted.module
    return same and own.dtype == weight.dtype and own.device == device_of(adapted.module)


def _acts(adapted: AdaptedModule) -> bool:
    parameters = adapted.parameters()
    if not adapted.is_lora:
        return bool(adapted.delta(1.0).any())
    return "magnitude" in parameters or all(bool(each.any()) for each in parameters.values())


def save_lora(
    path: str | Path, adapted: Mapping[str, AdaptedModule], metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes adapted modules in the dialect of diffusers (``unet.<path>.lora_A.weight``), which ``load_lora_weights``,
    and this library, read. Alphas that differ from the rank are folded into the way up. Raises OSError."""
    tensors: dict[str, Tensor] = {}
    for name, each in adapted.items():
        if not each.is_lora:
            raise NotSupported(f"{name} is no LoRA; only LoRA and DoRA can be written.")
        parts = {part: tensor.detach().cpu() for part, tensor in each.parameters().items()}
        component, _, where = name.partition(".")
        name = f"{component}.{published_path(component, where)}"
        factor = each.delta_factor
        tensors[f"{name}.lora_A.weight"] = parts["down"]
        tensors[f"{name}.lora_B.weight"] = parts["up"] if math.isclose(factor, 1.0) else parts["up"] * factor
        if "magnitude" in parts:
            tensors[f"{name}.lora_magnitude_vector"] = parts["magnitude"].flatten()
    return files.save_tensors(path, tensors, dict(metadata) if metadata else None)
