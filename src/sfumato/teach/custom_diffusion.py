"""Custom Diffusion: new concepts in the keys and values of the text alone, and several of them merged in seconds.

Kumari et al. 2023 (arXiv 2212.04488). Text enters a denoiser through K = W_k c and V = W_v c only, and these weights
change most when a whole model is fine-tuned (section 3.1). So they alone learn, with the vectors of one new word per
concept that begin as a rare token's; pictures of the same kind, with their own captions, keep the rest. As in the
authors' code, the start token's keys and values carry no gradient, and pictures are shown small and near
(:mod:`.augment`). Concepts are learnt together in one run (folders "NAME CLASS"), or apart and *merged*: for every
matrix a constrained least squares in closed form (:mod:`sfumato.adapters.closed_form`). ``compress`` keeps the largest
singular directions of each change, which is a LoRA.

    >>> taught = CustomDiffusion(name="<rex>", class_noun="ball").teach(model, "photos")
    >>> taught.save("rex.safetensors")  # weights, and the word in rex-word.safetensors
    >>> merged(model, [Part("<rex>", "ball", words, weights), other], captions).weights

The closed form holds where keys and values are linear in the text: in cross-attention. In joint attention (SD3, Flux)
``add_k_proj`` and ``add_v_proj`` learn in the same way, but their inputs change from layer to layer and with the noise,
so there is nothing to merge exactly; a merge is refused there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.adapters.closed_form import low_rank
from sfumato.adapters.layers import Scaling, adapt_module
from sfumato.adapters.trainable import CROSS, copies, matching, substituted_weights
from sfumato.cards import Card, Field, FilePath, Template, register
from sfumato.errors import BadInput
from sfumato.models import Model
from sfumato.models.condition import Condition
from sfumato.models.modes import frozen
from sfumato.models.text_towers import text_towers
from sfumato.protocol import Work
from sfumato.teach.augment import resized
from sfumato.teach.concepts import Concept, ConceptsLoss, draw_priors, folders_of, require_class
from sfumato.teach.denoising import Denoising
from sfumato.teach.identifier import meant, pick
from sfumato.teach.learning import learn, recomputed, refuse_other_run, run_settings
from sfumato.teach.merging import merge_files
from sfumato.teach.parameters import PictureParams
from sfumato.teach.subject import Latents, Subject
from sfumato.teach.taught import Taught
from sfumato.teach.word_vectors import WordVectors, refuse_word
from sfumato.text.placeholders import placeholders
from sfumato.training import Player

__all__ = ["CustomDiffusion", "start_detached"]


@register
class CustomDiffusion:
    """The card and the parameters; :meth:`teach` does the work."""

    CARD = Card(
        key="custom_diffusion",
        title="Multi-Concept Customization of Text-to-Image Diffusion",
        authors="Kumari, Zhang, Zhang, Shechtman, Zhu",
        year=2023,
        arxiv="2212.04488",
        verb="teach",
        needs=("pictures", "noise_path", "differentiable_state"),
        defaults_from="the paper and its code: 250 steps of 8, 1e-5 times the batch, 200 other pictures",
        cost="6 forward-equivalents per picture and step, the codec's, and the other pictures",
        not_reproduced="retrieving captioned pictures of the kind from LAION: give a folder, or the model draws them",
        summary="concepts in the keys and values of the text and a new word each, merged in closed form",
        example="custom_diffusion:class_noun=ball",
    )
    RESUMES: ClassVar[bool] = True

    class Params(PictureParams):
        name: str = Field(default="<new1>", description="the new word")
        class_noun: str = Field(default="", description="what the pictures show, such as ball; merge: taken from files")
        prompt: Template = Field(default="photo of a {}", description="sentence; {} is word and class")
        attention: bool = Field(default=False, description="the whole cross-attention learns, for faces")
        regular: FilePath = Field(
            default="", description="folder of other pictures of the kind, with captions; none: drawn"
        )
        prior: int = Field(default=200, ge=0, le=10000, description="how many are drawn; 0: none")
        prior_weight: float = Field(default=1.0, ge=0, description="their weight")
        augment: bool = Field(default=True, description="show pictures small and near")
        merge: list[FilePath] = Field(
            default=[], description="merge these files instead of learning; DATA: captions, a line each"
        )
        ridge: float = Field(default=1e-6, gt=0, description="merge: share of the mean square that is added")
        compress: float = Field(
            default=0.0, ge=0, le=1, description="share of singular values that is kept as a LoRA; 0.6"
        )
        steps: int = Field(default=250, ge=1, description="how many steps")
        batch: int = Field(
            default=8, ge=1, le=1000, description="pictures of each concept per step, and as many others"
        )
        lr: float = Field(default=8e-5, gt=0, le=1, description="learning rate of AdamW")
        word_lr: float = Field(default=0.0, ge=0, le=10, description="of the word; 0: as lr, as in the code")
        weight_decay: float = Field(default=1e-2, ge=0, description="weight decay, not of the word")

    def __init__(self, **given: Any):
        self.params = self.Params(**given)

    def teach(self, model: Model, data: Any, *, work: Work | None = None) -> Taught:
        """The concept of the pictures in ``data``, or several from its folders "NAME CLASS"; with ``merge``, the
        concepts of the files that it names. ``model`` is afterwards as it was.

        Raises BadInput, NotSupported (merging in joint attention), Conflict: see
        :func:`~sfumato.teach.learning.opened`.
        """
        p, work = self.params, work or Work()
        if p.merge:
            return self._compressed(model, merge_files(model, p.merge, data, p.prompt, p.ridge, self.CARD.key))
        require_class(p.class_noun, self.CARD.key)
        towers = text_towers(model)
        concepts, rows = [], []
        for number, (folder, name, noun) in enumerate(folders_of(data, p.name, p.class_noun)):
            refuse_word(towers, name)
            subject = Subject(model, folder, (p.size, p.size) if p.size else None)
            rare = pick(towers, {*meant(model), *subject.captions}, p.seed, number + 1)[number]
            concepts.append(Concept(subject, f"{name} {noun}", name, noun, p.prompt))
            rows.append(WordVectors(towers, name, rare, 1, p.seed))
        denoiser = model.family.denoiser_name
        pattern = r"(.*\.)?attn2\..*" if p.attention and _cross(model) else rf"{CROSS}\.weight"
        weights = copies(model, {denoiser: pattern})

        def encode(prompts: Sequence[str]) -> Condition:
            with placeholders(model, {each.word: each.shown() for each in rows}):
                return model.encode_text(list(prompts), guidance=False)

        learning = dict(weights)
        for new in rows:
            learning |= {f"{new.word}.{name}": value for name, value in new.parameters.items()}
        loss = ConceptsLoss(
            Denoising(model, p.batch, p.seed, p.timesteps), concepts, encode, p.batch, p.prior_weight, p.flip, p.seed,
            resized if p.augment else None,
        )  # fmt: skip
        settings = run_settings(self, model, pictures=[each.subject.hash for each in concepts])
        refuse_other_run(work, settings)
        if p.regular:
            for each in concepts:
                self._keep_given(model, each)
        elif p.prior:
            draw_priors(model, concepts, p.prior, p.seed, work)
        tensors = nn.ParameterList(list(learning.values()))
        matrices, vectors = list(tensors)[: len(weights)], list(tensors)[len(weights) :]
        groups = [
            {"params": matrices, "lr": p.lr, "weight_decay": p.weight_decay},
            {"params": vectors, "lr": p.word_lr or p.lr, "weight_decay": 0.0},
        ]
        player = Player(loss, torch.optim.AdamW(groups), tensors, name="concepts")
        with ExitStack() as stack:
            stack.enter_context(frozen(model))
            stack.enter_context(recomputed(model, p.checkpointing))
            stack.enter_context(substituted_weights(model, weights))
            stack.enter_context(start_detached(model))
            done = learn(
                player, p.steps, name=self.CARD.key, work=work, settings=settings, accumulate=p.accumulate, seed=p.seed,
                checkpoint_every=p.checkpoint_every,
            )  # fmt: skip
        facts = {
            "class": concepts[0].class_noun, "lr": p.lr, "seed": p.seed, "prompt": p.prompt,
            "pictures": sum(len(each.subject) for each in concepts), "subjects": [each.phrase for each in concepts],
        }  # fmt: skip
        found = Taught(
            model, self.CARD.key, words={each.word: each.taken() for each in rows},
            weights={name: value.detach() for name, value in weights.items()}, log=done.log, facts=facts,
            step=done.fitted.step, interrupted=not done.enough,
        )  # fmt: skip
        return found if found.interrupted else self._compressed(model, found)

    def _keep_given(self, model: Model, concept: Concept) -> None:
        """Other pictures of the kind with their captions, which are kept as they are."""
        plain = concept.prompt.format(concept.class_noun)
        others = Subject(model, self.params.regular, concept.subject.size)
        concept.prior = Latents(others)
        concept.prior_prompts = [text or plain for text in others.captions]

    def _compressed(self, model: Model, found: Taught) -> Taught:
        """The changes of the weights as a LoRA, if that is asked for."""
        share = self.params.compress
        if not share:
            return found
        for name, weight in found.weights.items():
            component, _, path = name.partition(".")
            if not path.endswith(".weight") or weight.ndim != 2:
                raise BadInput("compress keeps changes of matrices; leave attention out.")
            module = model.modules[component].get_submodule(path.removesuffix(".weight"))
            small = low_rank(weight - module.weight, share)
            where = name.removesuffix(".weight")
            parts = {"down": small.down, "up": small.up}
            found.lora[where] = adapt_module(module, parts, Scaling(), where, dtype=torch.float32)
        found.weights = {}
        found.facts |= {"compress": share}
        return found


def _cross(model: Model) -> bool:
    return any(site.kind == "cross" for site in model.sites())


@contextmanager
def start_detached(model: Model) -> Iterator[None]:
    """While it lasts, no gradient reaches keys and values through the start of the text, which is in every prompt. In
    models whose text begins without such a token (T5) there is nothing to detach."""
    first = next((stream for stream in model.tokenizers if stream.offset == 0), None)
    starts = first is not None and first.name.startswith("clip")

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :1].detach(), output[:, 1:]], 1)

    with ExitStack() as stack:
        for path in matching(model, model.family.denoiser_name, CROSS) if starts else ():
            module = model.denoiser.get_submodule(path)
            stack.callback(module.register_forward_hook(hook).remove)
        yield
