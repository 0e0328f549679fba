"""Learning the coefficients (section 3): the denoiser's own loss on pictures of the concept, and a sparsity loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from sfumato.arrays import to_tensor
from sfumato.errors import BadInput, UnknownName
from sfumato.explain.conceptor import vocabulary
from sfumato.explain.conceptor.candidates import candidates_of
from sfumato.explain.conceptor.decomposition import Decomposition, effective_number
from sfumato.explain.conceptor.pseudo_word import PseudoWord, draw
from sfumato.explain.conceptor.vocabulary import Dictionary, placeholder, usual_norms
from sfumato.models import Model
from sfumato.models.modes import frozen
from sfumato.models.readers import PLAIN, Clip, load_clip
from sfumato.models.readers.preprocessing import as_tensor
from sfumato.models.text_towers import pseudo_word
from sfumato.sampling import Path as NoisePath
from sfumato.sampling import generate
from sfumato.sampling.pixels import as_pictures
from sfumato.training import Draw, Player, Progress, denoising_loss, fit
from sfumato.training.losses import stratified

FRESH = 7919  # added to the seed of pictures that check a concept whose own seeds are not known
WEIGHT_DECAY = 1e-2


class Coefficients(nn.Module):
    """alpha (m) of embeddings (m d): |f(w)| with one hidden layer of 100 ("network"), or one number per word."""

    def __init__(self, width: int, kind: str, words: int, seed: int):
        super().__init__()
        self.kind = kind
        if kind == "network":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.layers = nn.Sequential(nn.Linear(width, 100), nn.ReLU(), nn.Linear(100, 1))
        else:
            self.free = nn.Parameter(torch.full((words,), 0.0 if kind == "softmax" else 1.0 / words))

    def forward(self, embeddings: Tensor) -> Tensor:
        if self.kind == "network":
            return self.layers(embeddings)[:, 0].abs()
        return self.free.softmax(0) if self.kind == "softmax" else self.free.abs()


def decompose(
    model: Model,
    concept: str = "",
    *,
    pictures: Sequence[Image.Image] | Tensor | None = None,
    seeds: Sequence[int] = (),
    template: str = "a {}",
    dictionary: Sequence[str] | Dictionary = (),
    exclude: Sequence[str] = (),
    pieces: bool = False,
    candidates: int = 5000,
    similar: float = 1.0,
    keep: int = 50,
    sparsity: float = 0.001,
    levels_count: str = "paper",
    coefficients: str = "network",
    images: int = 100,
    checked: int = 20,
    every: int = 50,
    iterations: int = 500,
    learning_rate: float = 1e-3,
    batch: int = 6,
    flip: bool = True,
    clip: str = PLAIN,
    seed: int = 1024,
    on_step: Callable[[int, int], None] | None = None,
    **drawing: Any,
) -> Decomposition:
    """Decompose a concept into words of the model's vocabulary.

    Args:
        concept: the word or phrase; its pictures are made by the model itself and its own words are not used.
        pictures: pictures of the concept instead (PIL, or (b 3 H W) in [-1, 1]); one is allowed. Those from number
            ``images`` on are for checking; ``seeds`` of these, where the model made them, pair the checks.
        dictionary: words that may be used (those of :func:`~.vocabulary.dictionary` by default).
        seed: of the pictures (``seed`` + i), the network, and the noise.
        drawing: options of the sampling loop for all pictures that are made (``steps``, ``guidance``, ...).

    The other arguments are the parameters of :class:`Conceptor`. Raises BadInput, UnknownName for words of
    ``dictionary`` that are not one token in every encoder, NotSupported for models without a text encoder.
    """
    if not concept and pictures is None:
        raise BadInput("decompose needs a concept, or pictures of it.")
    if coefficients not in ("network", "free", "softmax"):
        raise UnknownName("coefficients", coefficients, ("network", "free", "softmax"))
    if levels_count not in ("paper", "alike"):
        raise UnknownName("levels_count", levels_count, ("paper", "alike"))
    known = dictionary if isinstance(dictionary, Dictionary) else vocabulary.dictionary(model, pieces)
    known = known.subset(dictionary) if dictionary and not isinstance(dictionary, Dictionary) else known
    norms, word = usual_norms(model), placeholder(model, template)
    if pictures is None:
        examples = _drawn_examples(model, template.format(concept), images, checked, seed, drawing)
        exclude = [*exclude, *(name.lower().strip(".,") for name in concept.split())]
    else:
        examples = _given_examples(model, pictures, images, checked, seeds, seed, drawing)
    needs_clip = len(examples.check) or similar < 1 or len(known.names) > candidates
    net = load_clip(clip) if needs_clip else None
    known = candidates_of(known, set(exclude), net, examples.pixels, template, concept, similar, candidates)

    def picture(alphas: Tensor, seeds: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        vectors = known.vectors(largest(alphas, keep), norms)
        return draw(model, template, PseudoWord(word, vectors), seeds, **drawing), vectors

    inputs = torch.cat(list(known.tables.values()), 1)
    network = Coefficients(inputs.shape[1], coefficients, len(known.names), seed).to(inputs.device)
    examples_loss = _NoisedExamples(model, examples.pixels, flip, batch, seed)
    check = _Check(net, examples) if net is not None and len(examples.check) else None
    history: list[tuple[int, float, float, float]] = []

    def loss(draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        alphas = network(inputs)
        vectors = known.vectors(alphas, norms)
        with pseudo_word(model, word, vectors):
            condition = model.encode_text(template.format(word), guidance=False).rows([0] * batch)
        errors = examples_loss.errors(condition)
        denoising = errors.mean() if levels_count == "paper" else errors.log().mean()
        few = known.vectors(largest(alphas, keep), norms)
        sparse = torch.stack([1 - torch.cosine_similarity(few[n], vectors[n], dim=0) for n in few]).mean()
        number = effective_number(alphas.detach())
        history.append((draw.step, float(denoising.detach()), float(sparse.detach()), number))
        return denoising + sparsity * sparse, {}

    @torch.no_grad()
    def after(progress: Progress) -> None:
        if check is not None and (progress.step % every == 0 or progress.step == iterations):
            alphas = network(inputs)
            check(progress.step, alphas, picture(alphas, examples.check_seeds)[0])
        if on_step is not None:
            on_step(progress.step, iterations)

    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    with frozen(model):
        fitted = fit(Player(loss, optimizer, network), iterations, on_progress=after, name="conceptor")
    with torch.no_grad():
        alphas = check.best if check is not None and check.similarities else network(inputs).cpu()
        shown_seeds = examples.check_seeds or [seed + FRESH + i for i in range(8)]
        shown, vectors = picture(alphas.to(inputs), shown_seeds[:8])
    return Decomposition(
        concept=concept,
        template=template,
        model=model.name,
        names=known.names,
        alphas=alphas,
        keep=keep,
        history=tuple(history),
        checks=() if check is None else tuple(check.similarities),
        pictures=as_pictures((examples.check if len(examples.check) else examples.pixels)[:8]),
        drawn=as_pictures(shown),
        facts={"hash": model.weight_hash, "seed": seed, "iterations": fitted.step, "coefficients": coefficients},
        vectors=vectors,
    )


def largest(alphas: Tensor, n: int) -> Tensor:
    """Coefficients (m) with all but the ``n`` largest set to 0."""
    if n >= len(alphas):
        return alphas
    return alphas * torch.zeros_like(alphas).index_fill(0, alphas.topk(n).indices, 1.0)


# --- pictures of the concept -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Examples:
    """Pictures (b 3 H W) of a concept to learn from, and to ``check`` with, from which ``check_seeds`` on. ``paired``:
    whether those seeds made these pictures, so that each has its counterpart."""

    pixels: Tensor
    check: Tensor
    check_seeds: list[int]
    paired: bool


def _drawn_examples(
    model: Model, prompt: str, images: int, checked: int, seed: int, drawing: Mapping[str, Any]
) -> _Examples:
    """Pictures that the model makes of the concept."""
    seeds = [seed + i for i in range(images + checked)]
    made = generate(model, [prompt] * len(seeds), seed=seeds, batch_size=25, **drawing)
    assert made.pixels is not None
    pixels = made.pixels.detach().clamp(-1, 1)
    return _Examples(pixels[:images], pixels[images:], seeds[images:], paired=True)


def _given_examples(
    model: Model,
    pictures: Sequence[Image.Image] | Tensor,
    images: int,
    checked: int,
    seeds: Sequence[int],
    seed: int,
    drawing: Mapping[str, Any],
) -> _Examples:
    """Given pictures, the first ``images`` to learn from; where there are no others, checks use these as well."""
    size = drawing.get("size") or model.default_size[::-1]
    if isinstance(pictures, Tensor):
        pixels = pictures
    else:  # the centre, in the model's size
        pixels = as_tensor([ImageOps.fit(p.convert("RGB"), size, Image.Resampling.BICUBIC) for p in pictures])
    check = (pixels[images:] if len(pixels) > images else pixels)[:checked]
    check_seeds = list(seeds)[: len(check)] if seeds else [seed + FRESH + i for i in range(len(check))]
    return _Examples(pixels[:images], check, check_seeds, paired=bool(seeds))


# --- the denoiser's loss ---------------------------------------------------------------------------------------------


class _NoisedExamples:
    """Batches of pictures noised to all levels, and the denoiser's error on them."""

    def __init__(self, model: Model, pixels: Tensor, flip: bool, batch: int, seed: int):
        self.model, self.batch = model, batch
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.latents, self.mirrored = self._encoded(pixels), self._encoded(pixels.flip(-1)) if flip else None
        scheduler = model.make_scheduler(None if model.flow else "ddim")
        model.timesteps(scheduler, 10, *pixels.shape[-2:])
        self.path, self.levels = NoisePath(scheduler), int(scheduler.config.num_train_timesteps)

    def _encoded(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.model.encode_image(each).float() for each in pixels.split(25)])

    def errors(self, condition: Any) -> Tensor:
        """The mean squared error (b) of the denoiser's prediction for the next batch, under a condition (b rows)."""
        generator, b = self.generator, self.batch
        rows = torch.randint(len(self.latents), (b,), generator=generator)
        x0 = self.latents[rows]
        if self.mirrored is not None:
            flipped = torch.rand(b, generator=generator) < 0.5
            x0 = torch.where(flipped.view(-1, *[1] * (x0.ndim - 1)).to(x0.device), self.mirrored[rows], x0)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        t = (stratified(b, generator) * (self.levels - 1)).long().to(x0.device) + 1

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self.model.predict(x.to(self.model.dtype), t, condition, "cond")

        return denoising_loss(predict, self.path, x0, noise, t).errors


# --- checks ----------------------------------------------------------------------------------------------------------


class _Check:
    """CLIP similarity of drawn pictures to the concept's, by iteration, and the coefficients where it was best."""

    def __init__(self, net: Clip, examples: _Examples):
        self.net, self.paired = net, examples.paired
        self.target = self._features(examples.check)
        self.similarities: list[tuple[int, float]] = []
        self.best = torch.empty(0)

    def _features(self, pixels: Tensor) -> Tensor:
        return F.normalize(to_tensor(self.net.features(as_pictures(pixels))), dim=1)

    def __call__(self, iteration: int, alphas: Tensor, pixels: Tensor) -> None:
        """Each picture with its own counterpart where seeds pair them, else with the others' mean."""
        drawn, target = self._features(pixels), self.target
        each = (drawn * target).sum(1) if self.paired else drawn @ F.normalize(target.mean(0), dim=0)
        similarity = float(each.mean())
        if not self.similarities or similarity > max(value for _, value in self.similarities):
            self.best = alphas.cpu()
        self.similarities.append((iteration, similarity))
