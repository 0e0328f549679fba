"""Intercepting a pipeline's calls: while systems are attached, its class is a subclass that reports calls and texts."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sfumato.errors import BadInput, Conflict, NotSupported
from sfumato.models import Model
from sfumato.models.hosts import family_like
from sfumato.sampling.attached.unknown_family import UnknownFamily

__all__ = ["has_attached", "intercepted", "model_of"]


class _Intercepted:
    """Marks the class of a pipeline that has systems attached."""


def has_attached(pipe: Any) -> bool:
    """Whether systems are attached to a pipeline."""
    return isinstance(pipe, _Intercepted)


def model_of(pipe: Any, max_sequence_length: int | None = None) -> Model:
    """The pipeline under the face that systems know. Raises BadInput for what is no pipeline, NotSupported for one
    without a denoiser or a scheduler."""
    try:
        components = getattr(pipe, "components", None)
    except ValueError as error:  # diffusers compares them with what the class takes
        raise NotSupported(
            f"{type(pipe).__name__} holds components that its __init__ does not take, so diffusers cannot list them; "
            f"take all of them there."
        ) from error
    if not (callable(pipe) and isinstance(components, dict)):
        raise BadInput(f"attached takes a diffusers pipeline; {type(pipe).__name__} is none.")
    if getattr(pipe, "scheduler", None) is None:
        raise NotSupported(f"{type(pipe).__name__} has no scheduler, so its steps cannot be determined.")
    card = {"sampling": {"max_sequence_length": max_sequence_length}}
    if (family := family_like(pipe)) is not None:
        try:
            model = Model(pipe, card=card, family=family)
            model.tokenizers, model.text_length, model.family.scale  # noqa: B018
            return model
        except AttributeError:
            pass  # the networks of a family in a class that lacks what its pipelines have
    if not isinstance(UnknownFamily.denoiser_of(pipe), nn.Module):
        raise NotSupported(f"{type(pipe).__name__} has no network called unet or transformer to look into.")
    return Model(pipe, family=UnknownFamily)


@contextmanager
def intercepted(pipe: Any, call: Callable[[Any, dict[str, Any]], Any]) -> Iterator[None]:
    """While it lasts, calling ``pipe`` is ``call(proceed, arguments)``: ``proceed(now)`` makes the real call, and
    tells ``now.on_method(method, arguments, result)`` of texts that are encoded in it, and of the first latents. Raises
    Conflict for a pipeline that has systems attached already."""
    own = type(pipe)
    if has_attached(pipe):
        raise Conflict(f"{own.__name__} has systems attached already; give all of them to one attached(...).")
    calls: list[Any] = []
    threads: list[int] = []

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not pipe:  # a copy
            return own.__call__(self, *args, **kwargs)
        if calls:
            if threads != [threading.get_ident()]:
                raise Conflict(
                    f"{own.__name__} is being called by another thread while systems are attached to it; make one call "
                    f"after the other."
                )
            if calls[0].started:
                raise Conflict(
                    f"{own.__name__} is called inside its own call while systems are attached to it, which would mix "
                    f"the steps of both; make one call after the other."
                )
            return own.__call__(self, *args, **kwargs)  # it hands its call on to itself

        def proceed(now: Any) -> Any:
            calls.append(now)
            threads.append(threading.get_ident())
            try:
                return own.__call__(self, *args, **kwargs)
            finally:
                calls.clear()
                threads.clear()

        return call(proceed, _bound(own.__call__, self, args, kwargs))

    def intercept_method(name: str, real: Any) -> Any:
        @functools.wraps(real)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            listens = self is pipe and bool(calls)
            given = _bound(real, self, args, kwargs) if listens else {}
            given = {key: list(value) if isinstance(value, list) else value for key, value in given.items()}
            result = real(self, *args, **kwargs)  # some write their template into the list of prompts
            if listens:
                calls[0].on_method(name, given, result)
            return result

        return method

    members: dict[str, Any] = {"__module__": own.__module__, "__call__": functools.wraps(own.__call__)(__call__)}
    for name in ("encode_prompt", "prepare_latents"):
        if callable(real := getattr(own, name, None)):
            members[name] = intercept_method(name, real)
    object.__setattr__(pipe, "__class__", type(own.__name__, (own, _Intercepted), members))
    try:
        yield
    finally:
        object.__setattr__(pipe, "__class__", own)


def _bound(function: Any, pipe: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments of a call by name, defaults included; those of ``**kwargs`` beside the others. A call that does not fit
    the function is left for it to complain about."""
    try:
        bound = inspect.signature(function).bind(pipe, *args, **kwargs)
    except TypeError:
        return dict(kwargs)
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        found.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return found
