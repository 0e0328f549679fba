"""What a run teaches: one or several subjects, each with its sentences and with pictures of its class as they were."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import files
from sfumato.errors import BadInput
from sfumato.markup import described
from sfumato.models import Model
from sfumato.models.condition import Condition
from sfumato.models.weights import read_metadata
from sfumato.protocol import Work
from sfumato.rng import stream
from sfumato.sampling import generate
from sfumato.teach.denoising import Denoising, places
from sfumato.teach.subject import Subject
from sfumato.training import Draw
from sfumato.training.samples import PICTURES

__all__ = ["Concept", "ConceptsLoss", "draw_priors", "folders_of", "require_class"]


@dataclass(eq=False)
class Concept:
    """A subject under its name. ``said``: what stands for it in a sentence, such as "zqx ball"; ``prior``: latents
    (c h w) of other things of its class and what is said of each, to be kept as they are."""

    subject: Subject
    phrase: str
    name: str
    class_noun: str
    prompt: str = "a {}"
    prior: Sequence[Tensor] = ()
    prior_prompts: list[str] = field(default_factory=list)

    __repr__ = described

    def sentence(self, i: int) -> str:
        """Of picture ``i``: its caption if that has the name in it."""
        caption = self.subject.captions[i]
        return caption if self.name in caption else self.prompt.format(self.phrase)


def require_class(class_noun: str, key: str) -> None:
    """Raises BadInput where the system ``key`` was not told what the pictures show."""
    if not class_noun.strip():
        raise BadInput(f"class_noun of {key} must be given: what the pictures show, such as ball.")


def folders_of(data: str | Path, name: str, class_noun: str) -> list[tuple[Path | str, str, str]]:
    """(folder, name, class noun) of every subject: the folder itself, or, where it has no pictures of its own but
    folders called "NAME CLASS" (kohya's "10_NAME CLASS" too), one for each. Raises BadInput for a folder whose name
    says no class."""
    folder = Path(data)
    own = not folder.is_dir() or any(
        each.suffix.lower() in (*PICTURES, ".tar", ".jsonl", ".csv") for each in folder.iterdir()
    )
    inside = [] if own else sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    if not inside:
        return [(data, name, class_noun)]
    out: list[tuple[Path | str, str, str]] = []
    for each in inside:
        phrase, _, noun = re.sub(r"^\d+_", "", each.name).partition(" ")
        if not noun.strip():
            raise BadInput(f"{each} is one of several subjects; call its folder 'NAME CLASS', such as 'zqx ball'.")
        out.append((each, phrase, noun.strip()))
    return out


def draw_priors(model: Model, concepts: Sequence[Concept], n: int, seed: int, work: Work) -> None:
    """Gives every concept ``n`` pictures of its class as the model draws them now as its prior; they are kept in the
    folder of ``work``, for when it is resumed."""
    cache = None if work.folder is None else work.folder / "prior.safetensors"
    for number, each in enumerate(concepts):
        at = cache if number == 0 or cache is None else cache.with_stem(f"prior-{number}")
        plain = each.prompt.format(each.class_noun)
        each.prior, each.prior_prompts = made_prior(model, plain, n, seed + number, at), [plain] * n


def made_prior(model: Model, prompt: str, n: int, seed: int, cache: Path | None) -> list[Tensor]:
    """Latents (c h w) of ``n`` pictures that the model makes of a prompt as it is now, from seeds of their own; those
    in the file ``cache``, if they are the very same, and then written to it."""
    from safetensors.torch import load_file

    made_of = {"prompt": prompt, "n": str(n), "seed": str(seed), "model": model.weight_hash}
    if cache is not None and cache.is_file() and read_metadata(cache) == made_of:
        return [each.to(model.device) for each in load_file(cache)["latents"]]
    seeds = [seed * 1_000_003 + 77_000_000 + i for i in range(n)]
    made = generate(model, [prompt] * n, seed=seeds, decode=False, batch_size=25).latents
    assert made is not None
    latents = made.detach().float().cpu()
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        files.save_tensors(cache, {"latents": latents}, made_of)
    return [each.to(model.device) for each in latents]


class ConceptsLoss:
    """The loss of a step: for every concept a batch of its pictures and, weighted, a batch of its prior, all in one
    call of the denoiser (Ruiz et al. 2023, equation 2; several concepts: Kumari et al. 2023, their losses added).

    Args:
        encode: prompts -> condition.
        batch: pictures of each concept in a step.
        prior_weight: lambda.
        altered: (concept's picture, generator) -> latents, words to put before the sentence, mask (h w) or None: an
            augmentation.
    """

    def __init__(
        self,
        denoising: Denoising,
        concepts: Sequence[Concept],
        encode: Callable[[Sequence[str]], Condition],
        batch: int,
        prior_weight: float,
        flip: bool,
        seed: int,
        altered: Callable[..., tuple[Tensor, str, Tensor | None]] | None = None,
    ):
        self.denoising, self.concepts, self.encode = denoising, list(concepts), encode
        self.batch, self.prior_weight, self.flip, self.seed, self.altered = batch, prior_weight, flip, seed, altered

    def __call__(self, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        where = places(draw, self.batch)
        total: Any = 0
        logs: dict[str, Tensor] = {}
        for number, concept in enumerate(self.concepts):
            own = Draw(self.seed + 7919 * number, draw.step, draw.rank, draw.world)
            rows = own.indices(len(concept.subject), self.batch).tolist()
            latents, texts, masks = [], [], []
            for i, place in zip(rows, where, strict=True):
                each, text, mask = self._picture(concept, i, own.seed, draw.step, place)
                latents.append(each)
                texts.append(text)
                masks.append(mask)
            chosen = own.indices(len(concept.prior), self.batch).tolist() if len(concept.prior) else []
            latents += [concept.prior[i] for i in chosen]
            texts += [concept.prior_prompts[i] for i in chosen]
            masks += [None] * len(chosen)
            errors = self.denoising.errors(
                latents, self.encode(texts), draw.step, where + where[: len(chosen)], masks=masks,
                parts=[f"noise.{number}"] * len(where) + [f"prior.{number}"] * len(chosen),
            )  # fmt: skip
            subject, prior = errors[: len(where)].mean(), errors[len(where) :]
            total = total + subject
            logs["subject"] = logs.get("subject", 0) + subject.detach() / len(self.concepts)
            if len(prior):
                total = total + self.prior_weight * prior.mean()
                logs["prior"] = logs.get("prior", 0) + prior.mean().detach() / len(self.concepts)
        return total / len(self.concepts), logs

    def _picture(self, concept: Concept, i: int, seed: int, step: int, place: int) -> tuple[Tensor, str, Tensor | None]:
        generator = stream("teach.picture", seed, step, place)
        mirrored = self.flip and float(torch.rand((), generator=generator)) < 0.5
        if self.altered is None:
            return concept.subject.latents(i, mirrored), concept.sentence(i), None
        latents, before, mask = self.altered(concept.subject, i, mirrored, generator)
        return latents, f"{before}{concept.sentence(i)}", mask
