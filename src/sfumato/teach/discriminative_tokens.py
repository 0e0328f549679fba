"""Discriminative class tokens: a word learnt from a classifier, without pictures, for what a prompt says too vaguely.

Schwartz et al. 2023 (arXiv 2303.17155). The prompt is "a photo of <c> NAME"; the model draws it with its ordinary
sampler and guidance, a classifier of clean pictures reads the result, and its cross entropy moves the word's vectors
(section 3). All sampling steps but the last K run without gradient (gradient skipping), so neither a noise-aware
classifier nor the memory of a whole trajectory is needed. The same few noises come back in every update, crossed with
three sentences; it ends when more than 70 % of them are classified right twice running, or without progress. Stopping
early matters: a classifier can be fooled, and later updates please it alone.

    >>> taught = DiscriminativeTokens(target="cube", class_noun="toy").teach(model, "toy-vit")
    >>> generate(model, "a photo of <c> toy", interventions=Word(file=str(taught.save("c.safetensors")[0])))

Beyond the original: flow models, CLIPs and detectors as scorers (or any function of pictures), several classes in one
run, and shares of several classes for one word.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.cards import Card, Field, Template, register
from sfumato.errors import BadInput, NotSupported
from sfumato.models import Model
from sfumato.models.modes import frozen
from sfumato.models.text_towers import text_towers
from sfumato.protocol import Work
from sfumato.sampling import generate
from sfumato.sampling.loop import open_run, walk
from sfumato.sampling.request import checked_request
from sfumato.teach.learning import learn, recomputed, run_settings
from sfumato.teach.parameters import TeachParams
from sfumato.teach.scorers import Scorer, scorer_of
from sfumato.teach.taught import Taught
from sfumato.teach.word_vectors import WordVectors, refuse_word
from sfumato.text.placeholders import placeholders
from sfumato.training import BestTensors, Draw, Player
from sfumato.training.processes import processes

__all__ = ["DiscriminativeTokens"]


@register
class DiscriminativeTokens:
    """The card and the parameters; :meth:`teach` does the work."""

    CARD = Card(
        key="discriminative_tokens",
        title="Discriminative Class Tokens for Text-to-Image Diffusion Models",
        authors="Schwartz, Snaebjarnarson, Chefer, Cotterell, Belongie, Wolf, Benaim",
        year=2023,
        arxiv="2303.17155",
        verb="teach",
        needs=("pictures", "noise_path", "differentiable_state"),
        defaults_from="the authors' code: 30 steps, guidance 7, 5 noises, rate 1.25e-3; no weight decay",
        cost="per update and noise: a whole generation, and K backward passes",
        not_reproduced="training classifiers on the pictures (data augmentation)",
        summary="a word learnt from a classifier, so that a prompt draws the class that is meant",
        example="discriminative_tokens:target=cube",
    )
    RESUMES: ClassVar[bool] = True

    class Params(TeachParams):
        target: list[str] = Field(min_length=1, description="the scorer's class; several: a word for each")
        class_noun: str = Field(default="", description="what the prompt says beside the word; none: the target")
        name: str = Field(default="<c>", description="the new word; of several classes <c-1>, <c-2> ...")
        shares: list[str] = Field(default=[], description="one word for several classes, in such parts: cone=0.5")
        rivals: list[str] = Field(
            default=[], description="CLIP: texts that it is not to be; none: the class noun alone"
        )
        begin: str = Field(default="a", description="the word that the vectors begin as")
        vectors: int = Field(default=1, ge=1, le=16, description="k")
        templates: list[Template] = Field(
            default=["a photo of {}", "a high resolution realistic image of {}", "a close-up photo of a {}"],
            description="sentences; {} is word and class",
        )
        noises: int = Field(default=5, ge=1, le=1000, description="initial noises, the same in every update")
        through: int = Field(default=1, ge=1, le=1000, description="K: last steps that carry gradient")
        draw_steps: int = Field(default=30, ge=1, le=1000, description="denoising steps")
        guidance: float = Field(default=7.0, ge=0, description="guidance scale; the learning rate goes with it")
        steps: int = Field(default=50, ge=1, description="how many updates at most")
        enough: float = Field(
            default=0.7, gt=0, le=1, description="share classified right, twice running, that ends it"
        )
        patience: int = Field(default=15, ge=0, description="updates without a lower loss that end it; 0: never")
        lr: float = Field(default=1.25e-3, gt=0, le=10, description="learning rate of AdamW")
        clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
        checkpoint_every: int = Field(default=10, ge=1, description="updates between checkpoints")
        seed: int = Field(default=35, ge=0, description="of the noises")

    def __init__(self, **given: Any):
        self.params = self.Params(**given)

    def teach(self, model: Model, data: Any, *, work: Work | None = None) -> Taught:
        """A word for every target. ``data``: the scorer - a classifier, CLIP or detector by built-in name or folder, a
        loaded reader, or a function from pictures (b 3 H W) in [-1, 1] to scores (b) that are to rise. ``model`` is
        afterwards as it was.

        Raises BadInput, also for a scorer whose score is not finite or does not follow the picture, UnknownName for a
        class that it lacks, NotSupported for one that is none.
        """
        if processes() > 1:
            raise NotSupported(f"{self.CARD.key} decides by single updates when to stop; run it in one process.")
        p, work = self.params, work or Work()
        if p.through > p.draw_steps:
            raise BadInput(f"through is {p.through}, and there are {p.draw_steps} steps.")
        if p.shares and len(p.target) > 1:
            raise BadInput("shares are for one word; give one target, or several without shares.")
        towers = text_towers(model)
        names = [p.name] if len(p.target) == 1 else [
            f"{p.name.removesuffix('>')}-{i + 1}{'>' if p.name.endswith('>') else ''}" for i in range(len(p.target))
        ]  # fmt: skip
        for name in names:
            refuse_word(towers, name)
        if twice := next((name for i, name in enumerate(p.target) if name in p.target[:i]), None):
            raise BadInput(f"target names {twice!r} twice.")
        scorers = [scorer_of(data, target, p.shares, p.rivals, p.class_noun or target, p.noises) for target in p.target]
        if work.resume and work.folder is not None and not any(work.folder.glob("**/run.json")):
            raise BadInput(f"there is nothing to resume: {work.folder} holds no run.")
        found = Taught(model, self.CARD.key, facts={"class": p.class_noun or p.target[0], "lr": p.lr, "seed": p.seed})
        begun = time.monotonic()
        for i, (name, target, scorer) in enumerate(zip(names, p.target, scorers, strict=True)):
            left = None if work.minutes is None else max(1e-9, work.minutes - (time.monotonic() - begun) / 60)
            part = Work(work.folder, work.resume, left, work.on_progress) if len(names) > 1 else work
            if work.folder is not None and len(names) > 1:
                part.folder = work.folder / str(i)
                part.resume = work.resume and (part.folder / "run.json").is_file()
            lesson = self._learn(model, towers, name, target, scorer, part)
            found.words[name] = lesson.words()[name]
            found.log += lesson.log
            found.step += lesson.step
            found.facts[name] = lesson.facts(target, scorer)
            if lesson.interrupted:
                found.interrupted = True
                break
        return found

    def _learn(self, model: Model, towers: Any, name: str, target: str, scorer: Scorer, work: Work) -> _WordTraining:
        p = self.params
        lesson = _WordTraining(
            model, WordVectors(towers, name, p.begin, p.vectors, p.seed), p.class_noun or target, scorer, p
        )
        optimizer = torch.optim.AdamW(list(lesson.best.learning), lr=p.lr, weight_decay=0.0)
        modules = {"word": lesson.best, "past": lesson.past}
        player = Player(lesson.loss, optimizer, modules, name="word", clip=p.clip)
        settings = run_settings(self, model, target=target, scorer=scorer.name)
        with frozen(model), scorer.frozen(), recomputed(model, p.checkpointing):
            done = learn(
                player, p.steps, name=self.CARD.key, work=work, settings=settings, accumulate=p.noises, seed=p.seed,
                after=lesson.after, stop=lesson.over, checkpoint_every=p.checkpoint_every,
            )  # fmt: skip
        lesson.best.take()
        lesson.log, lesson.step, lesson.interrupted = done.log, done.fitted.step, not done.enough
        return lesson


class _History(nn.Module):
    """Loss and share of hits of every update so far: what decides when to stop, and belongs to a checkpoint."""

    def __init__(self, steps: int):
        super().__init__()
        self.register_buffer("losses", torch.full((steps,), float("nan")))
        self.register_buffer("hits", torch.full((steps,), float("nan")))


class _WordTraining:
    """The word of one class."""

    log: list[dict[str, float]]
    step: int
    interrupted: bool

    def __init__(self, model: Model, rows: WordVectors, noun: str, scorer: Scorer, p: DiscriminativeTokens.Params):
        self.model, self.rows, self.noun, self.scorer, self.p = model, rows, noun, scorer, p
        self.best, self.past = BestTensors(rows.parameters), _History(p.steps)
        self._sums = [0.0, 0.0]
        self._before: dict[str, Tensor] = {}

    def words(self) -> dict[str, dict[str, Tensor]]:
        return {self.rows.word: self.rows.taken()}

    def drawn(self, noise: int, seed: int) -> Tensor:
        """The picture (1 3 H W) of a noise and its sentence, with gradients to the vectors through the last steps."""
        p, model = self.p, self.model
        prompt = p.templates[noise % len(p.templates)].format(f"{self.rows.word} {self.noun}")
        options: dict[str, Any] = {"steps": p.draw_steps, "seed": seed, "guidance": p.guidance}
        if not model.flow:
            options["scheduler"] = "ddim"
        with placeholders(model, {self.rows.word: self.rows.shown()}):
            first = p.draw_steps - p.through
            latents = None
            if first:
                request = checked_request(model, [prompt], latents=None, image=None, **options)
                with torch.no_grad(), open_run(model, request, range(1), ()) as run:
                    latents = walk(run, run.process.initial(slice(0, 1)), until=first)
            made = generate(model, prompt, latents=latents, start=first, grad=True, **options)
        assert made.pixels is not None
        return made.pixels

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        if draw.rank == 0:
            self._sums, self._before = [0.0, 0.0], self.rows.taken()
        pixels = self.drawn(draw.rank, self.p.seed + draw.rank + 1_000 * self._again(draw.step))
        # what leaves [-1, 1] is cut off in a picture
        loss, hit = self.scorer(pixels.clamp(-1, 1), draw.rank)
        self._sums[0] += float(loss.detach()) / self.p.noises
        self._sums[1] += float(hit) / self.p.noises
        return loss, {"hits": torch.tensor(float(hit))}

    def _again(self, step: int) -> int:
        """How often the loss has more than doubled over the best before: other noises then."""
        values = [value for value in self.past.losses[:step].tolist() if value == value]
        return sum(value > 2 * min(values[:i]) for i, value in enumerate(values) if i)

    @torch.no_grad()
    def after(self, step: int) -> dict[str, float]:
        loss, hits = self._sums
        earlier = self.past.losses[: step - 1]
        if step == 1 or loss < float(earlier.min()):
            self.best.keep(self._before.values())  # the vectors that this loss is of
        self.past.losses[step - 1], self.past.hits[step - 1] = loss, hits
        return self.rows.figures()

    def over(self, step: int) -> bool:
        losses, hits, p = self.past.losses[:step].tolist(), self.past.hits[:step].tolist(), self.p
        if step > 1 and min(hits[-2:]) > p.enough:
            return True
        return bool(p.patience) and step > p.patience and min(losses[-p.patience :]) >= min(losses[: -p.patience])

    def facts(self, target: str, scorer: Scorer) -> dict[str, Any]:
        known = [i for i, value in enumerate(self.past.losses.tolist()) if value == value]
        return {"target": target, "scorer": scorer.name, "updates": len(known),
                "hits": float(self.past.hits[known[-1]]) if known else 0.0, "nearest": self.rows.nearest()}  # fmt: skip
