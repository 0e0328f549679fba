"""Adapters: parts that are added to a loaded model, and taken away again without a trace.

An adapter is an intervention of the role that acts first and goes last, so it is given beside the systems, as
``generate(..., interventions=[LoRA(file="x.safetensors", scale=0.8)])`` or, on the command line, as
``--with lora:file=x.safetensors,scale=0.8``; outside a generation ``with adapter.attach(model): ...`` does the same.
Several stack in the order given. Parameters, buffers, module trees, hooks and tokenizers are afterwards what they were,
bit for bit, however it ends.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from sfumato import cards
from sfumato.adapters.formats import Contents, content_hash, find_file, read_contents
from sfumato.adapters.metadata import check_base
from sfumato.adapters.weight_sets import Weights, swapped_weights
from sfumato.cards import Field, FilePath
from sfumato.errors import BadInput
from sfumato.models import Model
from sfumato.sampling import Intervention, Run, Step

__all__ = ["Adapter", "AdapterParams", "Merged"]


class AdapterParams(cards.Params):
    """What every adapter is given."""

    file: FilePath = Field(
        description="the adapter's .safetensors file, or the name of one in the cache's adapters folder"
    )
    scale: float = Field(default=1.0, description="how much of it is applied; below 0 its opposite, 0 nothing at all")
    hash: str = Field(
        default="", description="SHA-256 of the file, or its beginning; another file is refused. Recipes hold it"
    )
    any_base: bool = Field(
        default=False, description="use it although the file says that it was taught on a model with other weights"
    )


class Merged:
    """An adapter merged into a model's weights; :meth:`undo` puts the very parameters back that were there. Until then
    the model's ``weight_hash``, which recipes hold, is another one."""

    def __init__(self, model: Model, context: AbstractContextManager[None], what: str):
        self._stack = ExitStack()
        before = model.weight_hash
        self._stack.callback(model.__dict__.__setitem__, "weight_hash", before)
        self._stack.enter_context(context)
        model.__dict__["weight_hash"] = hashlib.sha256(f"{before} {what}".encode()).hexdigest()

    def undo(self) -> None:
        """May be called again; does nothing then."""
        self._stack.close()


class Adapter(Intervention):
    """Base of adapters that live in a file: reading and its hash, taking part in a run, coverage.

    A subclass has a card whose parameters extend :class:`AdapterParams`, says which ``kind`` of file it takes
    (:class:`~sfumato.adapters.formats.Contents`), and attaches itself.
    """

    role = "adapter"
    kind: ClassVar[str]
    Params: ClassVar[type[AdapterParams]]

    def __init__(self, **given: Any):
        """Reads the file's header. Raises BadInput for a file that is missing, of another kind, or has another hash
        than asked for; BadWeights for pickles and damaged files."""
        params = self.Params(**given)
        self.path = find_file(params.file)
        self.hash = content_hash(self.path)
        if not self.hash.startswith(params.hash.lower()):
            raise BadInput(
                f"{self.path} has changed: its hash is {self.hash[:10]}, and hash of {self.name} asks for "
                f"{params.hash[:10]}; give the file that was used then, or leave hash out to take this one."
            )
        self.params = params.model_copy(update={"hash": self.hash})
        self.contents: Contents = read_contents(self.path)
        if self.contents.kind != self.kind and not (self.kind == "word" and self.contents.words):
            held = "nothing that is known" if self.contents.kind == "unknown" else f"a {self.contents.kind}"
            raise BadInput(f"{self.path} holds {held}, not a {self.kind}; see: sfumato adapters {self.path}.")
        self._acted: dict[str, None] = {}

    @classmethod
    def load(cls, file: str | Path, **given: Any) -> Any:
        """The adapter of a file; ``given``: further parameters, such as ``scale``."""
        return cls(file=str(file), **given)

    @property
    def scale(self) -> float:
        return float(self.params.scale)

    @property
    def strength(self) -> float:
        return self.scale

    # -- attaching -----------------------------------------------------------------------------------------------------

    @contextmanager
    def attach(self, model: Model, scale: float | None = None) -> Iterator[None]:
        """While it lasts, the model works with the adapter at ``scale`` (its own). 0 attaches nothing, but the fit is
        checked all the same. Raises NoMatch and BadWeights for an adapter that does not fit the model, BadInput for one
        that was taught on other weights."""
        check_base(self.contents.metadata, model, self.path, self.params.any_base)
        with ExitStack() as stack:
            self._attach(model, self.scale if scale is None else float(scale), stack)
            yield

    @abstractmethod
    def _attach(self, model: Model, scale: float, stack: ExitStack) -> None:
        """Attach, and leave on ``stack`` what undoes it."""

    def acted(self, *names: str) -> None:
        """Note that something of this adapter was used, for the coverage."""
        self._acted.update(dict.fromkeys(names))

    def start(self, run: Run) -> None:
        self._acted = {}
        run.enter(self.attach(run.model))

    def on_text(self, run: Run, condition: Any) -> Any:
        self._tell(None)
        return condition

    def after_predict(self, step: Step) -> None:
        self._tell(step)

    def _tell(self, step: Step | None) -> None:
        if self._acted:
            self.mark(step, **self._covered(list(self._acted)))
            self._acted = {}

    def _covered(self, names: list[str]) -> dict[str, list[str]]:
        return {"sites": names}

    # -- as weights ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def weights(self, model: Model, scale: float | None = None) -> dict[str, Weights]:
        """The parameters that the model would have with the adapter in them: component -> path -> parameter. Raises
        NotSupported for one that is no change of weights."""

    def merge(self, model: Model, scale: float | None = None) -> Merged:
        """Puts the adapter into the weights of the model, until ``undo``: no cost per call, equal up to rounding."""
        check_base(self.contents.metadata, model, self.path, self.params.any_base)
        used = self.scale if scale is None else float(scale)
        weights = swapped_weights(model.modules, self.weights(model, used))
        return Merged(model, weights, f"{self.name} {self.hash} {used!r}")

    def diff(self, model: Model, scale: float | None = None) -> dict[str, float]:
        """``component.path`` of each parameter it changes -> the change's length relative to the parameter's."""
        out = {}
        for component, weights in self.weights(model, scale).items():
            own = dict(model.modules[component].named_parameters())
            for path, new in weights.items():
                length = own[path].detach().float().norm()
                out[f"{component}.{path}"] = float((new.float() - own[path].detach().float()).norm() / length)
        return dict(sorted(out.items(), key=lambda item: -item[1]))
