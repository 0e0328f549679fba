"""ConceptAttention: where in a picture a concept is, also one that no word of the prompt names.

Concepts run through the transformer beside the prompt. At every joint attention they attend to the picture and to each
other with the weights of the text; picture and prompt do not see them (section 4 of the paper, equations 4 and 5). How
much a place of the picture is like a concept is the inner product of the two outputs of that attention, and the softmax
over the concepts shares the place out among them (section 4.2): maps of outputs are sharper than those of attention
itself. Before, as in the authors' segmentation, every channel of the concepts is shifted to begin at 0 and divided by
its sum over the concepts: else the few channels in which they are longest decide alone.

    >>> look = ConceptAttention(concepts=["ball", "cone", "grass"])
    >>> result = generate(model, "toys in the sun", interventions=look)

The paper rewrites each network. Here the denoiser is called a second time with the concepts in place of the prompt,
while keys and values of the picture are those of the first call: the same numbers, in any network with joint attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato import cards
from sfumato.attention.accumulate import MapStore
from sfumato.attention.call import Call
from sfumato.attention.map_replacement import MapReplacement
from sfumato.attention.sites import Site, matches_place
from sfumato.attention.tap import Tap
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput, NoMatch, NotSupported
from sfumato.explain.heatmaps import HeatMaps
from sfumato.explain.real_images import observe_images
from sfumato.models import Model
from sfumato.sampling import Intervention, Run, Step
from sfumato.sampling.intervention import Coverage
from sfumato.text.words import Reading, StreamReading, Words
from sfumato.windows import Window

__all__ = ["ConceptAttention", "explain_image", "explain_images"]

#: the paper reads layers 15 to 18 of Flux's 19 in which text and picture have weights of their own; in SD3, which has
#: no others, the authors' code reads all
SHARE = 4 / 19
#: how a concept's maps are listed and looked up, as words of a text of their own
BETWEEN = ", "


@register
class ConceptAttention(Intervention):
    """Makes maps of concepts during generation. Afterwards ``maps`` holds one :class:`HeatMaps` per sample."""

    CARD = Card(
        key="concept_attention",
        title="ConceptAttention: Diffusion Transformers Learn Highly Interpretable Features",
        authors="Helbling, Meral, Hoover, Yanardag, Chau",
        year=2025,
        arxiv="2502.04320",
        verb="explain",
        needs=("joint_attention",),
        defaults_from="the authors' code: the last fifth of Flux's layers, all of SD3's; softmax over concepts",
        cost="1 more forward of the conditional branch per step read; keys and values of one step in memory",
        not_reproduced="the segmentation benchmarks on ImageNet and PascalVOC; videos",
        summary="heat maps of concepts that need not be in the prompt",
        example="concept_attention:concepts=[cube|cone|grass]",
    )

    class Params(cards.Params):
        concepts: list[str] = Field(description="what to look for; each place is shared out among them")
        layers: list[str] = Field(
            default=[],
            description="blocks or module paths to read, such as joint.3; none: all, or where single-stream layers "
            "follow, as in Flux, the last fifth of the others",
        )
        window: Window = Field(
            default=(0.0, 1.0),
            description="share of the denoising to read, from start to end",
            json_schema_extra={"unit": "progress"},
        )
        space: Literal["output", "attention"] = Field(
            default="output",
            description="compare what attention gives to picture and concepts, or the picture's queries with the "
            "concepts' keys, which is what the paper holds against it",
        )
        normalise: bool = Field(
            default=True,
            description="divide each channel of two or more concepts by its sum over them, counted from its least",
        )
        share: bool = Field(
            default=True, description="softmax over the concepts; false: their raw likeness, one by one"
        )
        per_step: bool = Field(default=False, description="keep steps apart; memory then grows with them")

    role = "observer"

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        self.window = self.params.window
        concepts = [concept.strip() for concept in self.params.concepts]
        if not concepts or not all(concepts) or len({concept.lower() for concept in concepts}) < len(concepts):
            raise BadInput(f"concepts of concept_attention are {self.params.concepts}: give names, each once.")
        if len(concepts) == 1 and self.params.share:
            raise BadInput(
                f"concept_attention shares places out among its concepts; beside {concepts[0]!r} name what else is "
                f"there, such as the background, or set share=false."
            )
        self.concepts = concepts
        self.maps: list[HeatMaps] = []
        self.activity = Coverage()

    # -- what the loop calls -------------------------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Encodes the concepts and chooses sites. Raises NoMatch for layers that the model has not, BadInput for more
        concepts than its text axis has room for."""
        if run.samples.start == 0:
            self.maps = []
        joint = [site for site in run.sites if site.kind == "joint" and site.text is not None and site.grid is not None]
        if not joint:
            raise NotSupported(f"concept_attention reads joint attention, and {run.model.name} has none.")
        self._read = {site.path for site in self._chosen(joint, run.model.name)}
        last = max(site.index for site in joint if site.path in self._read)
        self._followed = {site.path for site in joint if site.index <= last}
        self._vectors = _encoded(run.model, self.concepts)
        self._captured: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._store = MapStore(steps=self.params.per_step)

    def taps(self) -> Sequence[Tap]:
        return [Tap(lambda site: site.path in self._followed, observe=self._note, name="concept_attention")]

    def after_predict(self, step: Step) -> None:
        """Follows the concepts through the network, beside what the prediction has shown of the picture."""
        if not self._captured:
            raise NotSupported("concept_attention saw no conditional branch in this step.")
        own = step.condition.cond["embeds"]
        if len(self._vectors) > own.shape[1]:
            raise BadInput(
                f"concept_attention has {len(self._vectors)} concepts; the text axis has room for {own.shape[1]}."
            )
        embeds = torch.zeros_like(own)
        embeds[:, : len(self._vectors)] = self._vectors.to(own)
        condition = replace(step.condition, cond={**step.condition.cond, "embeds": embeds})
        with torch.no_grad():
            tap = Tap(lambda site: site.path in self._followed, edit_map=self._attending, name="concepts")
            step.predict(condition=condition, taps=[tap], edited=False)
        self._captured = {}
        self.mark(step, sites=self._read, tokens=self.concepts)

    def finish(self, run: Run) -> None:
        if not len(self._store):
            return
        facts = {
            "model": run.model.name,
            "steps": run.total,
            "timesteps": [float(t) for t in run.timesteps],
            "window": list(self.window),
            "share": self.params.share,
        }
        for i in range(len(run)):
            self.maps.append(
                HeatMaps(
                    reading=_reading(self.concepts),
                    layers=tuple(self._store.take(i)),
                    positions=tuple(range(len(self.concepts))),
                    size=(run.size[1], run.size[0]),
                    words=tuple(self.concepts),
                    facts={**facts, "seed": run.seeds[i], "prompt": run.prompts[i]},
                )
            )
        del self._store, self._vectors, self._captured

    def explain_image(self, model: Model, image: Any, prompt: str, **options: Any) -> Any:
        """:func:`explain_image` with these parameters."""
        return explain_image(model, image, prompt, **{**dict(self.params), **options})

    def pictures(self, result: Any, index: int) -> dict[str, Image.Image]:
        """A sheet of overlays for one picture, by file suffix."""
        return {"concepts": self.maps[index].grid(result.images[index])}

    # -- inside attention ----------------------------------------------------------------------------------------------

    def _note(self, call: Call) -> None:
        """Keys and values of the picture, and at sites that are read what its attention gives, or its queries."""
        if "cond" not in call.rows:
            return
        part, image, picture = call.branch("cond"), call.image, None
        if call.site.path in self._read:
            with torch.no_grad():
                own = part.of_queries(image)
                picture = own.attend() if self.params.space == "output" else own.q
        self._captured[call.site.path] = part.k[:, :, image].detach(), part.v[:, :, image].detach(), picture

    def _attending(self, call: Call) -> MapReplacement | None:
        if "cond" not in call.rows:
            return None

        def attend(own: Call) -> Tensor:
            """Concepts attend to the picture of the first call and to each other; nobody else does anything."""
            k, v, picture = self._captured[own.site.path]
            mine = slice(own.text.start, own.text.start + len(self._vectors))
            k, v = torch.cat([k, own.k[:, :, mine]], 2), torch.cat([v, own.v[:, :, mine]], 2)
            concepts = F.scaled_dot_product_attention(
                own.q[:, :, mine], k, v, scale=own.given_scale, enable_gqa=own.enable_gqa
            )
            if picture is not None:
                heads = picture.shape[1]
                keys = own.k[:, :, mine].repeat_interleave(heads // own.k.shape[1], 1) * (own.scale / heads)
                others = concepts if self.params.space == "output" else keys
                others = normalised(others.float()) if self.params.normalise else others.float()
                alike = torch.einsum("bknd,bkcd->bnc", picture.float(), others)
                maps = alike.softmax(-1) if self.params.share else alike
                self._store.add(own.site, maps[:, None], own.step.i)
            out = torch.zeros_like(own.q)
            out[:, :, mine] = concepts
            return out

        def probs(own: Call, queries: slice) -> Tensor:
            raise NotSupported("the attention of concepts is not a map of the prompt.")

        return MapReplacement(call.rows["cond"], attend, probs)

    # -- choices -------------------------------------------------------------------------------------------------------

    def _chosen(self, joint: list[Site], model: str) -> list[Site]:
        p = self.params
        if p.layers and (chosen := [site for site in joint if matches_place(site, p.layers)]):
            return chosen
        if p.layers:
            places = ", ".join(dict.fromkeys(site.block for site in joint))
            raise NoMatch(f"layers={p.layers} of concept_attention match none of {model}'s: {places}.")
        double = [site for site in joint if site.block.startswith("joint")] or joint
        return double if len(double) == len(joint) else double[-math.ceil(SHARE * len(double)) :]


def normalised(concepts: Tensor) -> Tensor:
    """Each channel of concepts (b heads c d), counted from its least, over its sum over the concepts; where all have
    the same it is 0. A single concept stays as it is."""
    above = concepts - concepts.amin(2, keepdim=True)
    return concepts if concepts.shape[2] == 1 else above / above.sum(2, keepdim=True).clamp_min(1e-30)


def _encoded(model: Model, concepts: list[str]) -> Tensor:
    """One embedding for each concept (c d), encoded by itself: of its first token where the encoder reads both ways, as
    the paper does with T5, of its last one where it reads forward only and knows the whole there."""
    words = Words(model)
    with torch.no_grad():
        embeds = model.encode_text(concepts, None, False).cond["embeds"]
    rows = []
    for concept, row in zip(concepts, embeds, strict=True):
        tokens = words.read(concept).tokens()
        both_ways = next((name for name in tokens if name.startswith("t5")), None)
        places = tokens[both_ways or next(iter(tokens))]
        if not places:
            raise NoMatch(f"the text encoders of {model.name} read nothing in the concept {concept!r}.")
        rows.append(row[places[0] if both_ways else places[-1]])
    return torch.stack(rows)


def _reading(concepts: list[str]) -> Reading:
    """A text of the concepts alone in which each is one token, so that maps are asked for by name."""
    spans, at = [], 0
    for concept in concepts:
        spans.append((at, at + len(concept)))
        at += len(concept) + len(BETWEEN)
    text = BETWEEN.join(concepts)
    special: dict[str, tuple[int, ...]] = {"<start>": (), "<end>": (), "<pad>": ()}
    return Reading(text, {"concepts": StreamReading(0, tuple(spans), special, len(text), len(concepts))})


def explain_images(
    model: Model,
    images: Any,
    prompts: str | Sequence[str],
    *,
    steps: int = 20,
    seed: int | Sequence[int] = 0,
    scheduler: Any = None,
    size: tuple[int, int] | None = None,
    **params: Any,
) -> list[HeatMaps]:
    """Maps of concepts in pictures that exist already, with prompts that may be empty, noised to every level within
    ``window``; two forwards per level and picture. ``params``: of :class:`ConceptAttention`; all else as of
    :func:`sfumato.explain.daam.explain_images`. Raises BadInput, NoMatch, NotSupported."""
    look = ConceptAttention(**params)
    observe_images(look, model, images, prompts, steps=steps, seed=seed, scheduler=scheduler, size=size)
    return look.maps


def explain_image(model: Model, image: Any, prompt: str, words: Sequence[str] = (), **options: Any) -> HeatMaps:
    """As :func:`explain_images` of one picture; ``words``: concepts, where ``options`` name none."""
    options["concepts"] = list(options.get("concepts") or words)
    found = explain_images(model, image, prompt, **options)
    if len(found) != 1:
        raise BadInput(f"explain_image takes one picture, not {len(found)}; explain_images takes several.")
    return found[0]
