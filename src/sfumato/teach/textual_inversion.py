"""Textual inversion: a new word for what a few pictures show, learnt while the model stays as it is.

Gal et al. 2022 (arXiv 2208.01618), equation 2: the vectors v* of a placeholder in the table of token embeddings are

    v* = argmin E || eps - eps_theta(x_t, t, c(y)) ||^2,

over the pictures, noise, noise levels and neutral sentences y with the placeholder in them (:mod:`.templates`). The
gradient runs through denoiser and text encoder; nothing else learns, so a file holds a few kilobytes. From the
authors' code: k vectors per word, one more vector every so often (progressive), a word of its own for each picture,
distance to the beginning as a regulariser. Beyond it: every text encoder that a model has, flow models, a probe at
fixed noise that ends the run on its plateau and picks the best vectors, and a guard on their length, because vectors
longer than any word's make a model deaf to the rest of the prompt.

    >>> taught = TextualInversion(name="<rex>", class_noun="ball").teach(model, "photos")
    >>> taught.save("rex.safetensors")
    >>> generate(model, "a <rex> on the snow", interventions=Word(file="rex.safetensors"))
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sfumato.cards import Card, Field, Template, register
from sfumato.errors import BadInput
from sfumato.models import Model
from sfumato.models.condition import Condition
from sfumato.models.modes import frozen
from sfumato.protocol import Work
from sfumato.rng import stream
from sfumato.teach.denoising import Denoising, Probe, places
from sfumato.teach.learning import learn, recomputed, run_settings
from sfumato.teach.parameters import PictureParams
from sfumato.teach.subject import Subject
from sfumato.teach.taught import Taught
from sfumato.teach.templates import DUAL, OBJECT, STYLE
from sfumato.teach.word_vectors import WordVectors, refuse_word, towers_of
from sfumato.text.placeholders import placeholders
from sfumato.training import BestTensors, Draw, Player

__all__ = ["TextualInversion"]

MOST_OWN = 100  # pictures with a word of their own; the authors' code: 22


@register
class TextualInversion:
    """The card and the parameters; :meth:`teach` does the work."""

    CARD = Card(
        key="textual_inversion",
        title="An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion",
        authors="Gal, Alaluf, Atzmon, Patashnik, Bermano, Chechik, Cohen-Or",
        year=2022,
        arxiv="2208.01618",
        verb="teach",
        needs=("pictures", "noise_path", "differentiable_state"),
        defaults_from="diffusers' example (learning rate 5e-4 times batch 4), but no weight decay",
        cost="3 forward-equivalents per picture and step, and the text encoder's",
        not_reproduced="unfreeze_model of the code, which trains the whole model (dreambooth does)",
        summary="a new word for a thing or a style from three to five pictures; the model stays as it is",
        example="textual_inversion:name=<rex>,class_noun=ball",
        default_for=("teach",),
    )
    RESUMES: ClassVar[bool] = True

    class Params(PictureParams):
        name: str = Field(description="the new word, such as <rex>")
        class_noun: str = Field(
            default="", description="what it is, such as ball: where the vectors begin; none: random"
        )
        begin: str = Field(default="", description="another word for the vectors to begin as; none: class_noun")
        kind: Literal["object", "style"] = Field(default="object", description="the sentences it is learnt in")
        templates: list[Template] = Field(
            default=[], description="sentences with {} instead; none: the 27 or 19 of the code"
        )
        with_class: bool = Field(default=False, description="write the class before the word: a photo of a ball <rex>")
        vectors: int = Field(default=1, ge=1, le=64, description="k: more look more alike and obey prompts less")
        progressive: int = Field(default=0, ge=0, description="one vector more every so many steps; 0: all at once")
        per_picture: float = Field(
            default=0.0, ge=0, le=1, description="share of steps with a second word that is the picture's own; 0.25"
        )
        regularise: float = Field(default=0.0, ge=0, description="weight of the distance to where the vectors began")
        encoders: list[str] = Field(default=[], description="text encoders that get vectors; none: all")
        length: Literal["free", "clamp", "pull"] = Field(
            default="clamp", description="vectors: no longer than the longest word, or pulled to the table's deviation"
        )
        steps: int = Field(default=3000, ge=1, description="how many steps at most")
        patience: int = Field(default=10, ge=0, description="end after so many probes without progress; 0: never")
        probe_every: int = Field(default=50, ge=1, description="steps between probes")
        lr: float = Field(default=2e-3, gt=0, le=10, description="learning rate of AdamW")
        batch: int = Field(default=4, ge=1, le=1000, description="pictures per step")
        keep_aspect: bool = Field(default=False, description="pictures keep their aspect instead of being cut")

    def __init__(self, **given: Any):
        self.params = self.Params(**given)

    def teach(self, model: Model, data: Any, *, work: Work | None = None) -> Taught:
        """The word for the pictures of ``data`` (a folder or shards; captions of theirs that hold the word are used in
        place of sentences). ``model`` is as it was afterwards.

        Raises BadInput: no pictures, a name that is a word already; Conflict: see
        :func:`~sfumato.teach.learning.opened`.
        """
        p = self.params
        towers = towers_of(model, p.encoders)
        refuse_word(towers, p.name)
        subject = Subject(model, data, (p.size, p.size) if p.size else None, p.keep_aspect)
        lesson = _WordTraining(model, subject, p, towers)
        best = BestTensors(lesson.parameters)
        optimizer = torch.optim.AdamW(list(best.learning), lr=p.lr, weight_decay=0.0)
        player = Player(lesson.loss, optimizer, best, name="word")
        settings = run_settings(self, model, pictures=subject.hash)
        with frozen(model), recomputed(model, p.checkpointing):
            done = learn(
                player, p.steps, name=self.CARD.key, work=work or Work(), settings=settings, best=best,
                measure=lesson.probed, every=p.probe_every, patience=p.patience, accumulate=p.accumulate, seed=p.seed,
                after=lesson.after, checkpoint_every=p.checkpoint_every,
            )  # fmt: skip
        rows = lesson.rows
        facts = {
            "class": p.class_noun, "vectors": p.vectors, "lr": p.lr, "seed": p.seed, "pictures": len(subject),
            "probe_first": best.figures[0][1], "probe_best": min(value for _, value in best.figures),
            **rows.figures(), "nearest": rows.nearest(),
        }  # fmt: skip
        return Taught(
            model, self.CARD.key, words={p.name: rows.taken()}, log=done.log, facts=facts, step=done.fitted.step,
            interrupted=not done.enough,
        )  # fmt: skip


class _WordTraining:
    """The loss of a step, and the words in it."""

    def __init__(self, model: Model, subject: Subject, p: TextualInversion.Params, towers: list[Any]):
        self.model, self.subject, self.p = model, subject, p
        self.denoising = Denoising(model, p.batch, p.seed, p.timesteps)
        begin = p.begin or p.class_noun
        self.rows = WordVectors(towers, p.name, begin, p.vectors, p.seed)
        self.parameters = {f"{p.name}.{name}": rows for name, rows in self.rows.parameters.items()}
        self.own: list[WordVectors] = []
        if p.per_picture and len(subject) > MOST_OWN:
            raise BadInput(f"per_picture gives every picture a word of its own, at most {MOST_OWN}; there are "
                           f"{len(subject)}: leave it out.")  # fmt: skip
        if p.per_picture:
            name = p.name.strip("<>")
            self.own = [
                WordVectors(towers, f"<{name}-picture-{i}>", begin, 1, p.seed + 1 + i) for i in range(len(subject))
            ]
            self.parameters |= {f"{each.word}.{k}": v for each in self.own for k, v in each.parameters.items()}
        self.templates = p.templates or list(OBJECT if p.kind == "object" else STYLE)
        few = range(min(len(subject), 8))
        self.probe = Probe(self.denoising, [subject.latents(i) for i in few])

    def length(self, step: int) -> int:
        """How many vectors the word has at a step."""
        return self.p.vectors if not self.p.progressive else min(self.p.vectors, 1 + step // self.p.progressive)

    def prompt(self, i: int, step: int, place: int) -> str:
        """The sentence of a sample of picture ``i``."""
        caption = self.subject.captions[i]
        if self.p.name in caption:
            return caption
        generator = stream("teach.sentence", self.p.seed, step, place)
        template = self.templates[int(torch.randint(len(self.templates), (), generator=generator))]
        word = f"{self.p.class_noun} {self.p.name}" if self.p.with_class and self.p.class_noun else self.p.name
        if self.own and float(torch.rand((), generator=generator)) < self.p.per_picture:
            word = DUAL.format(word, self.own[i].word)
        return template.format(word)

    def encoded(self, prompts: list[str], vectors: int) -> Condition:
        words = {self.p.name: self.rows.shown(vectors), **{each.word: each.shown() for each in self.own}}
        with placeholders(self.model, words):
            return self.model.encode_text(prompts, guidance=False)

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        p, where = self.p, places(draw, self.p.batch)
        rows = draw.indices(len(self.subject), p.batch).tolist()
        coins = [torch.rand((), generator=stream("teach.flip", p.seed, draw.step, place)) for place in where]
        mirrored = [p.flip and float(coin) < 0.5 for coin in coins]
        latents = [self.subject.latents(i, flip) for i, flip in zip(rows, mirrored, strict=True)]
        prompts = [self.prompt(i, draw.step, place) for i, place in zip(rows, where, strict=True)]
        condition = self.encoded(prompts, self.length(draw.step))
        errors = self.denoising.errors(latents, condition, draw.step, where)
        distance_from_start = self.rows.distance_from_start() if p.regularise else errors.new_zeros(())
        return errors.mean() + p.regularise * distance_from_start, {}

    def after(self, step: int) -> dict[str, float]:
        self.rows.constrain(self.p.length)
        for each in self.own:
            each.constrain(self.p.length)
        return self.rows.figures()

    def probed(self, step: int) -> dict[str, float]:
        """The loss at fixed noise and levels, the word in a plain sentence."""

        def encode(i: int) -> Condition:
            return self.encoded([self.templates[i % len(self.templates)].format(self.p.name)], self.p.vectors)

        return {"probe": self.probe(encode)}
