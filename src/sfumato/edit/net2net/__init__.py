"""Net2Net: one frozen expert translated into another by a small conditional flow.

Rombach, Esser, Ommer 2020 (arXiv 2005.13580). Phi reads a text, Theta and Lambda encode and decode pictures; both stay
as they are. A flow tau makes z_Theta = tau(v | z_Phi) with v normal (equation 3): v holds what the picture has beyond
the text. Training maximises the likelihood of z_Theta (equation 6), which bounds and removes what v and z_Phi share
(equation 7). Drawing v gives many pictures for one text; keeping v and changing the text changes a picture by its words
and keeps the rest.

    sfumato teach toybox --by net2net --model toy-ae -o flow      fits tau: minutes
    sfumato edit toy.png "a blue cube" --from "a red cube" --by net2net:flow=flow
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from sfumato import cards, files, sheets
from sfumato.arrays import to_tensor
from sfumato.cards import Card, Field, FilePath, ModelPath, register
from sfumato.edit.net2net.experts import NetExpert, autoencoder_expert, expert
from sfumato.edit.net2net.translation import Translation, fit_translation, load_translation
from sfumato.errors import BadInput, NotSupported
from sfumato.markup import described
from sfumato.models.nets.vector_ae import VectorAutoencoder, load_autoencoder
from sfumato.models.weights import hash_modules
from sfumato.protocol import Picture
from sfumato.translation.examples import open_examples
from sfumato.translation.translator import FlowParams

__all__ = ["NetExpert", "Net2Net", "Translation", "expert", "fit_translation", "load_translation"]

SECOND = "toy-ae"


@register
class Net2Net:
    """Teaches a flow between two experts, and edits pictures with it."""

    CARD = Card(
        key="net2net",
        title="Network-to-Network Translation with Conditional Invertible Neural Networks",
        authors="Rombach, Esser, Ommer",
        year=2020,
        arxiv="2005.13580",
        verb="edit",
        needs=(),
        defaults_from="the paper and the authors' code; LayerNorm in place of BatchNorm, sized for minutes on a CPU",
        cost="one forward of each expert for each picture that is learnt from; a picture costs one decoding",
        not_reproduced="BigGAN and its dequantised classes; the authors' experts: give yours",
        summary="translates one frozen network's representation into another's: text to picture, and edits by text",
    )
    OPENING = ("from_",)
    RESUMES: ClassVar[bool] = False

    class Params(FlowParams):
        first: ModelPath = Field(
            default="toy-clip",
            description="what conditions: a CLIP (its texts), transformers:FOLDER, label:CONCEPT, pixels:SIDE",
        )
        flow: FilePath = Field(
            default="", description="a folder that teaching wrote; none: it is taught before the edit"
        )
        pictures: int = Field(default=2000, ge=32, description="how many pictures to learn from at most")
        source: str | None = Field(
            default=None, description="what the picture shows", json_schema_extra={"flag": False}
        )

    def __init__(self, **given: Any):
        self.params = self.Params(**given)

    @staticmethod
    def load_model(name: str | Path | None) -> VectorAutoencoder:
        """The second expert, which makes the pictures. Raises UnknownName, BadWeights."""
        return load_autoencoder(name or SECOND)

    def teach(
        self,
        model: str | Path | VectorAutoencoder = SECOND,
        data: str | Path = "toybox",
        *,
        on_progress: Callable[..., None] | None = None,
    ) -> Translation:
        """Fits the flow from ``first`` to ``model``, an autoencoder of vectors.

        Args:
            data: "toybox", or a folder of pictures with captions (or with the column of ``label:``).

        Raises BadInput: too few pictures, without captions. NotSupported: no autoencoder of vectors.
        """
        p = self.params
        second = _second(model)
        concept = p.first.partition(":")[2] if p.first.startswith("label:") else ""
        concepts = [concept] if concept else []
        examples = open_examples(data, p.pictures, second.side, concepts, p.seed)
        first = expert(p.first, examples.names.get(concept, []))

        def report(progress: Any) -> None:
            if on_progress is not None:
                on_progress(progress.step, progress.steps, progress.logs)

        return fit_translation(first, second, examples, p, report)

    def open(
        self,
        model: VectorAutoencoder,
        picture: Picture,
        on_step: Callable[..., Any] | None = None,
        **opening: Any,
    ) -> OpenedPicture:
        """A picture opened for editing; ``picture.prompt`` is what it shows.

        Raises BadInput: nothing says what it shows; NotSupported: the flow is of another kind.
        """
        p = self.params
        shown = p.source or picture.prompt
        if not shown:
            raise BadInput("net2net needs to know what the picture shows now: --from, or from_=.")
        translation = load_translation(p.flow) if p.flow else self.teach(model)
        if translation.first.kind == "picture" or translation.second.side == 0:
            raise NotSupported(
                f"the flow goes from {translation.first.name}, which reads no texts; edits need one that does."
            )
        side = translation.second.side
        pixels = to_tensor(np.asarray(files.fitted(picture.image.convert("RGB"), (side, side))))
        return OpenedPicture(self, model, translation, pixels.permute(2, 0, 1)[None] / 127.5 - 1, shown)


def _second(model: Any) -> NetExpert:
    if isinstance(model, VectorAutoencoder):
        return autoencoder_expert(model, getattr(model, "name", "") or SECOND)
    if not isinstance(model, str | Path):
        raise NotSupported(f"net2net makes pictures with an autoencoder of vectors; {type(model).__name__} is none.")
    return autoencoder_expert(load_autoencoder(model), str(model))


@dataclass(eq=False)
class Edited:
    """One edit: ``images``, ``prompts``, ``parts`` and ``recipe`` as a result of ``generate`` has them."""

    images: list[Any]
    prompts: list[str]
    parts: list[Any]
    recipe: dict[str, Any]
    model: Any


@dataclass(eq=False)
class OpenedPicture:
    """A picture (1 3 h w) with what it shows; edits keep its residual."""

    system: Net2Net
    model: VectorAutoencoder
    translation: Translation
    pixels: Tensor
    shown: str
    facts: dict[str, Any] = field(default_factory=dict)

    __repr__ = described

    @property
    def rebuilt(self) -> Any:
        """What the autoencoder keeps of the picture, as a PIL picture."""
        z = self.translation.second.encode(self.pixels)
        return sheets.as_picture(self.translation.decoded(z)[0])

    def edit(
        self, prompt: str, *, mask: Any = None, with_: Sequence[Any] = (), on_step: Any = None, **params: Any
    ) -> Edited:
        """The picture with ``prompt`` for what it shows. Raises NotSupported for masks and systems beside this one."""
        if mask is not None or with_:
            raise NotSupported("net2net changes the whole picture by its representation; leave masks and --with out.")
        after = self.translation.exchange(self.pixels, [self.shown], [prompt])
        system = Net2Net(**{**self.system.params.model_dump(exclude={"source"}), "source": self.shown})
        hash_ = hash_modules({"second": self.model, "flow": self.translation.translator})
        recipe = {
            "prompt": prompt, "model": self.translation.second.name, "hash": hash_,
            "size": list(self.pixels.shape[:1:-1]), "with": [cards.to_recipe(system)],
        }  # fmt: skip
        return Edited([sheets.as_picture(after[0])], [prompt], [system], recipe, self.model)
