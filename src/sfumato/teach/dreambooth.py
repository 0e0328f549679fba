"""DreamBooth: a subject under an identifier, learnt by the weights, with its class kept as it was.

Ruiz et al. 2023 (arXiv 2208.12242), equation 2: pictures of the subject are called "a [identifier] [class noun]", and
while the denoiser learns them it goes on learning what the *frozen* model draws for "a [class noun]":

    E || x(z_t, c) - x ||^2  +  lambda E || x(z_t', c_pr) - x_pr ||^2.

The identifier is a token that means nothing (:mod:`.identifier`). ``mode`` says what learns: all weights (the paper),
a LoRA (DoRA and rsLoRA too, by peft's layers), keys and values of the text alone, or *pivotal*: a new word together
with a LoRA, the word held fast after the first half, as in diffusers' advanced example. With ``score_every``
checkpoints are scored for identity, leak, drift and diversity (:mod:`sfumato.bench.subject`), the best within bounds is
kept and all are shown in a plot.

    >>> taught = DreamBooth(class_noun="ball", mode="lora").teach(model, "photos")
    >>> taught.facts["identifier"], taught.save("rex.safetensors")
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from sfumato.adapters.trainable import ATTENTION, CROSS, TEXT, adapting, copies, new_lora, substituted_weights
from sfumato.bench.subject import Score
from sfumato.cards import Card, Field, ModelPath, Template, register
from sfumato.errors import BadInput
from sfumato.models import Model
from sfumato.models.condition import Condition
from sfumato.models.modes import frozen
from sfumato.models.readers import PLAIN
from sfumato.models.text_towers import TextTower, text_towers
from sfumato.protocol import Work
from sfumato.teach.concepts import Concept, ConceptsLoss, draw_priors, folders_of, require_class
from sfumato.teach.denoising import Denoising, frozen_conditions
from sfumato.teach.identifier import meant, pick
from sfumato.teach.learning import learn, recomputed, refuse_other_run, run_settings
from sfumato.teach.parameters import PictureParams
from sfumato.teach.scoring import SubjectScorer, plotted
from sfumato.teach.subject import Subject
from sfumato.teach.taught import Taught
from sfumato.teach.word_vectors import WordVectors, refuse_word
from sfumato.text.placeholders import placeholders
from sfumato.training import BestTensors, Player

__all__ = ["DreamBooth"]

RATES = {"full": 5e-6, "lora": 1e-4, "kv": 1e-5, "pivotal": 1e-4}


@register
class DreamBooth:
    """The card and the parameters; :meth:`teach` does the work."""

    CARD = Card(
        key="dreambooth",
        title="DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation",
        authors="Ruiz, Li, Jampani, Pritch, Rubinstein, Aberman",
        year=2023,
        arxiv="2208.12242",
        verb="teach",
        needs=("pictures", "noise_path", "differentiable_state"),
        defaults_from="diffusers' examples: steps with a prior, learning rates, rank, targets, clipping at 1",
        cost="3 forward-equivalents per picture and step, twice that with a prior, and the prior's pictures",
        not_reproduced="fine-tuning super-resolution stages, which latent models do not have",
        summary="a subject from three to five pictures into the weights or a LoRA, without forgetting its class",
        example="dreambooth:class_noun=ball",
    )
    RESUMES: ClassVar[bool] = True

    class Params(PictureParams):
        class_noun: str = Field(description="what the pictures show, such as ball")
        name: str = Field(default="", description="the identifier; none: a rare token is picked; pivotal: a new word")
        mode: Literal["lora", "full", "kv", "pivotal"] = Field(default="lora", description="what learns")
        text: bool = Field(default=False, description="the text encoders learn too")
        prompt: Template = Field(default="a {}", description="sentence; {} is identifier and class")
        prior: int = Field(
            default=100, ge=0, le=10000, description="pictures of the class that keep it as it was; 0: none"
        )
        prior_weight: float = Field(default=1.0, ge=0, description="lambda")
        rank: int = Field(default=4, ge=1, le=1024, description="r of the LoRA")
        alpha: float = Field(default=0.0, ge=0, description="alpha of the LoRA; 0: equal to the rank")
        dora: bool = Field(default=False, description="DoRA: the rows' lengths learn apart")
        rslora: bool = Field(default=False, description="rsLoRA: alpha over the root of the rank")
        targets: str = Field(default="", description="regular expression of the denoiser's modules; none: attention")
        pivot: float = Field(
            default=0.5, ge=0, le=1, description="pivotal: share of the steps in which the word learns"
        )
        lr: float = Field(
            default=0.0, ge=0, le=1, description="learning rate of AdamW; 0: 1e-4 LoRA, 5e-6 full, 1e-5 kv"
        )
        text_lr: float = Field(default=0.0, ge=0, le=1, description="of the text encoders; 0: as lr")
        word_lr: float = Field(default=1e-3, gt=0, le=10, description="of the word (pivotal)")
        weight_decay: float = Field(default=1e-2, ge=0, description="weight decay, not of the word")
        clip: float = Field(default=1.0, gt=0, description="largest norm of all gradients together")
        flip: bool = Field(default=False, description="mirror every second picture")
        keep_aspect: bool = Field(default=False, description="pictures keep their aspect instead of being cut")
        offset: float = Field(default=0.0, ge=0, description="offset noise; 0.1 for very dark or bright pictures")
        snr_gamma: float = Field(default=0.0, ge=0, description="min-SNR weighting; 5 is usual, 0 is none")
        score_every: int = Field(default=0, ge=0, description="steps between scores; 0: none, the last step counts")
        scored: int = Field(default=4, ge=2, le=1000, description="pictures of each kind that are drawn for a score")
        score_steps: int = Field(default=0, ge=0, le=1000, description="denoising steps of these; 0: the model's")
        net: ModelPath = Field(default=PLAIN, description="the CLIP that scores; built in, or a folder")

    def __init__(self, **given: Any):
        self.params = self.Params(**given)

    def teach(self, model: Model, data: Any, *, work: Work | None = None) -> Taught:
        """The subject of the pictures in ``data``, or several from its folders "NAME CLASS". ``model`` is afterwards as
        it was.

        Raises BadInput, NoMatch for targets that fit nothing, Conflict: see :func:`~sfumato.teach.learning.opened`.
        """
        p, work = self.params, work or Work()
        towers = text_towers(model)
        concepts = self._concepts(model, data, towers)
        learner = Learner(model, towers, concepts, p)
        settings = run_settings(self, model, pictures=[each.subject.hash for each in concepts])
        refuse_other_run(work, settings)
        if p.prior:
            draw_priors(model, concepts, p.prior, p.seed, work)
        best = BestTensors(learner.parameters) if p.score_every else None
        learning = best or nn.ParameterList(list(learner.parameters.values()))
        player = Player(
            learner.loss, torch.optim.AdamW(learner.groups()), learning, name="subject", clip=p.clip
        )  # fmt: skip
        with ExitStack() as stack:
            stack.enter_context(frozen(model))
            stack.enter_context(recomputed(model, p.checkpointing))
            scorer = None
            if p.score_every:
                scorer = SubjectScorer(
                    model, concepts[0], p.net, p.scored, p.seed, p.prompt, p.score_steps, learner.words
                )
            learner.attach(stack)
            done = learn(
                player, p.steps, name=self.CARD.key, work=work, settings=settings, best=best,
                measure=scorer, every=p.score_every or p.steps, accumulate=p.accumulate, seed=p.seed,
                checkpoint_every=p.checkpoint_every,
            )  # fmt: skip
        facts = {
            "class": concepts[0].class_noun, "identifier": "" if p.mode == "pivotal" else concepts[0].name,
            "mode": p.mode, "lr": learner.lr, "seed": p.seed, "pictures": sum(len(c.subject) for c in concepts),
            "prior": p.prior, "prompt": p.prompt, "subjects": [each.phrase for each in concepts],
        }  # fmt: skip
        if learner.lora:
            facts |= {"rank": p.rank, "alpha": p.alpha or p.rank}
        pictures = {}
        if scorer is not None:
            scores = [Score.from_json(each) for each in done.measured]
            facts["scores"] = [score.to_json() for score in scores]
            pictures["scores"] = plotted(scores)
        return Taught(
            model, self.CARD.key, words=learner.detached_words(), lora=learner.lora,
            weights={name: value.detach() for name, value in learner.weights.items()}, log=done.log, facts=facts,
            step=done.fitted.step, interrupted=not done.enough, pictures=pictures,
        )  # fmt: skip

    def _concepts(self, model: Model, data: Any, towers: list[TextTower]) -> list[Concept]:
        p = self.params
        require_class(p.class_noun, self.CARD.key)
        found, taken = [], set(meant(model))
        for number, (folder, name, noun) in enumerate(folders_of(data, p.name, p.class_noun)):
            subject = Subject(model, folder, (p.size, p.size) if p.size else None, p.keep_aspect)
            if p.mode == "pivotal":
                name = name or ("<subject>" if not number else f"<subject-{number + 1}>")
                refuse_word(towers, name)
            elif name.lower() in meant(model) or name.lower() in noun.lower().split():
                what = f"a word that {model.name} understands" if name.lower() in meant(model) else "the class itself"
                raise BadInput(f"name {name!r} is {what}; leave it out to have one picked.")
            else:
                name = name or pick(towers, {*taken, *subject.captions}, p.seed + number)[0]
            taken.add(name)
            found.append(Concept(subject, f"{name} {noun}", name, noun, p.prompt))
        return found


class Learner:
    """What learns in each mode, how it is attached, and its loss."""

    def __init__(self, model: Model, towers: list[TextTower], concepts: list[Concept], p: DreamBooth.Params):
        self.model, self.p, self.lr = model, p, p.lr or RATES[p.mode]
        denoiser, clips = model.family.denoiser_name, _clips(towers) if p.text else []
        self.lora: dict[str, Any] = {}
        self.weights: dict[str, nn.Parameter] = {}
        self.rows: list[WordVectors] = []
        if p.mode in ("lora", "pivotal"):
            targets = {denoiser: p.targets or ATTENTION, **{tower.name: TEXT for tower in clips}}
            self.lora = new_lora(
                model, targets, p.rank, p.alpha or None, dora=p.dora, rslora=p.rslora, seed=p.seed
            )  # fmt: skip
        else:
            own = p.targets or (".*" if p.mode == "full" else rf"{CROSS}\.weight")
            self.weights = copies(model, {denoiser: own, **{tower.name: ".*" for tower in clips}})
        if p.mode == "pivotal":
            self.rows = [WordVectors(towers, each.name, each.class_noun, 1, p.seed) for each in concepts]
        self.parameters = {f"{name}.{part}": value for name, each in self.lora.items()
                           for part, value in each.parameters().items()}  # fmt: skip
        self.parameters |= self.weights
        for rows in self.rows:
            self.parameters |= {f"{rows.word}.{name}": value for name, value in rows.parameters.items()}
        self._frozen = None if p.text or self.rows else frozen_conditions(model)
        self._step = 0
        denoising = Denoising(model, p.batch, p.seed, p.timesteps, p.offset, p.snr_gamma)
        self._loss = ConceptsLoss(denoising, concepts, self.encode, p.batch, p.prior_weight, p.flip, p.seed)

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: denoiser, text encoders, words."""
        p, out = self.p, {"denoiser": [], "text": [], "word": []}  # type: ignore[var-annotated]
        words = {id(value) for rows in self.rows for value in rows.parameters.values()}
        for name, value in self.parameters.items():
            kind = "word" if id(value) in words else "text" if name.startswith("text_encoder") else "denoiser"
            out[kind].append(value)
        rates = {"denoiser": self.lr, "text": p.text_lr or self.lr, "word": p.word_lr}
        return [
            {"params": values, "lr": rates[kind], "weight_decay": 0.0 if kind == "word" else p.weight_decay}
            for kind, values in out.items() if values
        ]  # fmt: skip

    def attach(self, stack: ExitStack) -> None:
        """For the rest of ``stack``'s life the model works with what is learnt."""
        stack.enter_context(adapting(self.lora))
        stack.enter_context(substituted_weights(self.model, self.weights))

    def words(self) -> dict[str, Any]:
        """The new words with their vectors now, for drawing."""
        return {rows.word: {k: v.detach() for k, v in rows.parameters.items()} for rows in self.rows}

    def detached_words(self) -> dict[str, Any]:
        return {rows.word: rows.taken() for rows in self.rows}

    def encode(self, prompts: Any) -> Condition:
        if self._frozen is not None:
            return self._frozen(prompts)
        held = self._step >= self.p.pivot * self.p.steps
        words = self.words() if held else {rows.word: rows.shown() for rows in self.rows}
        with placeholders(self.model, words):
            return self.model.encode_text(list(prompts), guidance=False)

    def loss(self, draw: Any) -> Any:
        self._step = draw.step
        return self._loss(draw)


def _clips(towers: list[TextTower]) -> list[TextTower]:
    """The text encoders that are taught: CLIPs, as in diffusers' scripts."""
    found = [tower for tower in towers if "clip" in getattr(tower.encoder.config, "model_type", "")]
    if not found:
        raise BadInput("text=true teaches CLIP text encoders, and this model has none: leave it out.")
    return found
