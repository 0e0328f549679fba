"""Which family a pipeline belongs to that is no class of any: it has the networks of one.

ControlNet, image-prompt, inpainting, upscaling and users' own pipelines drive the same denoiser with the same text
encoders as the text-to-image pipeline of a family, so that the text lies in the same place of attention.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from sfumato.models.families import Family, families

__all__ = ["family_like"]

#: parts that say nothing about where the text lies
_BESIDE = {"safety_checker", "feature_extractor", "image_encoder", "scheduler", "vae"}


def family_like(pipe: Any) -> type[Family] | None:
    """The family whose networks a pipeline has: by its class or one it derives from, else by its denoiser, text
    encoders and tokenizers; None where no family fits."""
    import diffusers

    settings = dict(getattr(pipe, "config", {})).items()
    fitting = {name: family for name, family in families().items() if family.told_by.items() <= settings}
    for cls in type(pipe).__mro__:
        if cls.__name__ in fitting:
            return _looking_inside(pipe, fitting[cls.__name__], getattr(diffusers, cls.__name__, None))
    for name, family in sorted(fitting.items(), key=lambda each: -len(each[1].told_by)):
        if not family.inpaints and isinstance(getattr(pipe, family.denoiser_name, None), nn.Module):
            own = getattr(diffusers, name, None)
            if own is not None and _has_networks(pipe, own):
                return family
    return None


def _looking_inside(pipe: Any, family: type[Family], own: Any) -> type[Family]:
    """The family, whose denoiser is the one network of the kind that the class ``own`` takes, where the pipeline has a
    module of the user's around it."""
    held = getattr(pipe, family.denoiser_name, None)
    kinds = _classes(own._get_signature_types().get(family.denoiser_name, ())) if own is not None else ()
    if not kinds or not isinstance(held, nn.Module) or isinstance(held, kinds) or hasattr(held, "_orig_mod"):
        return family
    inside = [part for part in held.modules() if isinstance(part, kinds)]
    if len(inside) != 1:
        return family
    seen = {"denoiser": property(lambda self: inside[0]), "__module__": family.__module__}
    return type(family.__name__, (family,), seen)


def _classes(kinds: Any) -> tuple[type, ...]:
    return tuple(kind for kind in kinds if inspect.isclass(kind) and kind is not inspect.Signature.empty)


def _has_networks(pipe: Any, own: Any) -> bool:
    """Whether a pipeline has the denoiser, encoders and tokenizers of the pipeline class ``own``, and no others."""
    parameters = inspect.signature(own.__init__).parameters
    for name, kinds in own._get_signature_types().items():
        if name in _BESIDE or parameters[name].default is not parameters[name].empty:
            continue
        part = getattr(pipe, name, None)
        classes = _classes(kinds)
        text = name.startswith(("text_encoder", "tokenizer"))
        if part is None and not (text and name in pipe.components):
            return False
        if part is not None and classes and not isinstance(part, classes) and not name.startswith("tokenizer"):
            return False  # tokenizers come in fast and slow classes
    towers = {name for name in pipe.components if name.startswith("text_encoder")}
    return bool(towers) and towers <= set(parameters) and any(getattr(pipe, name) is not None for name in towers)
