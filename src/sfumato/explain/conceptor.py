"""Conceptor: what a model's idea of something is made of, as a short weighted list of words.

Chefer, Lang, Geva, Polosukhin, Shocher, Irani, Mosseri and Wolf 2023 (arXiv 2306.00966). A pseudo-word
w* = sum_i alpha_i w_i over the embeddings of the vocabulary is put where the concept's name would stand, and the
coefficients are learnt through the frozen denoiser's own training loss on pictures of the concept, so that w* draws the
concept. A small network gives alpha_i = |f(w_i)|, so that words with close embeddings have close coefficients; a second
loss wants the N largest of them to make the same direction as all (section 3).

    >>> found = decompose(model, "cone")  # or pictures of anything
    >>> found.shares(3)
    [('ring', 0.31), ('small', 0.22), ('cylinder', 0.17)]
    >>> generate(model, "a cube on the grass", interventions=Conceptor(word="cube", mixture=found.mixture(10)))

:func:`explain_seed` reduces a decomposition to what one picture needs (section 4.2), :meth:`Decomposition.changed`
turns an ingredient up or down, :func:`balance` looks for the factor at which a measured share is what it should be
(section 5). Beyond the original: any number of text encoders (a dictionary of the words that all of them have as one
token, one coefficient each), flow models, and sets of given pictures.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from pydantic import field_validator
from torch import Tensor, nn

from sfumato import cards, files
from sfumato.bench.report import Figure, Report, Table
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput, Conflict, NoMatch, NotSupported, UnknownName
from sfumato.models import Model
from sfumato.models.features import DEFAULT_NET, clip_net
from sfumato.models.slot import TextTower, frozen, pseudo_word, text_towers, token_of
from sfumato.sampling import Intervention, Run, generate
from sfumato.sampling import Path as NoisePath
from sfumato.sampling.intervention import Coverage
from sfumato.sampling.request import as_pictures
from sfumato.text.words import Words

__all__ = ["Conceptor", "Decomposition", "Dictionary", "balance", "decompose", "dictionary", "explain_seed"]

FORMAT = "sfumato-decomposition-1"
PIECE = "+"  # marks a token that is only the beginning of words: "cu+"


# --- words and vectors -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Dictionary:
    """``names`` (m) and, per text encoder, their token ids (m) and embeddings (m d)."""

    names: tuple[str, ...]
    ids: dict[str, Tensor]
    tables: dict[str, Tensor]

    def only(self, keep: Sequence[int]) -> Dictionary:
        """Some of the words."""
        rows = list(keep)
        return Dictionary(
            tuple(self.names[i] for i in rows),
            {name: ids[rows] for name, ids in self.ids.items()},
            {name: table[rows] for name, table in self.tables.items()},
        )

    def vectors(self, weights: Tensor, norms: Mapping[str, float]) -> dict[str, Tensor]:
        """Per encoder sum_i weights_i w_i, at the length ``norms`` (d); gradients flow to the weights (m)."""
        out = {}
        for name, table in self.tables.items():
            mixed = weights.to(table) @ table
            out[name] = mixed * norms[name] / mixed.norm().clamp_min(1e-12)
        return out


def dictionary(model: Model, pieces: bool = False) -> Dictionary:
    """The words that every text encoder of a model has as one token; ``pieces``: also tokens that only begin words, as
    in the paper, whose dictionary is the whole vocabulary. Raises NotSupported without a text encoder."""
    towers, known = text_towers(model), _found.setdefault(model, {})
    if pieces not in known:
        tokens = [_names(tower, pieces) for tower in towers]
        shared = [name for name in tokens[0] if all(name in other for other in tokens[1:])]
        each = zip(towers, tokens, strict=True)
        known[pieces] = (
            tuple(shared),
            {t.name: torch.tensor([named[n] for n in shared], dtype=torch.long) for t, named in each},
        )
    names, ids = known[pieces]
    return Dictionary(names, ids, {tower.name: tower.table.detach()[ids[tower.name]].float() for tower in towers})


# names and ids by model, for asking a tokenizer of 50,000 tokens takes a second
_found: WeakKeyDictionary[Model, dict[bool, tuple[tuple[str, ...], dict[str, Tensor]]]] = WeakKeyDictionary()


def _names(tower: TextTower, pieces: bool) -> dict[str, int]:
    """Name -> token id of one encoder."""
    special = set(tower.tokenizer.all_special_ids)
    ids = [i for i in range(min(len(tower.tokenizer), len(tower.table))) if i not in special]
    texts = [tower.tokenizer.decode([i]).strip().removesuffix("</w>") for i in ids]
    again = tower.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    names: dict[str, int] = {}
    for i, text, back in zip(ids, texts, again, strict=True):
        if not text or not text.isprintable() or any(char.isspace() or char in "=+,|[]\"'\ufffd" for char in text):
            continue
        if back == [i]:
            if pieces or (text.isalpha() and len(text) > 1):
                names.setdefault(text.lower(), i)
        elif pieces:
            names.setdefault(text + PIECE, i)
    return names


def usual_norms(model: Model) -> dict[str, float]:
    """The mean length of the words' embeddings, per text encoder. (The paper averages over all tokens, pieces of words
    included; where most of these were never seen in training they are short, and so would be the pseudo-word.)"""
    return {name: float(table.norm(dim=1).mean()) for name, table in dictionary(model).tables.items()}


def read_mixture(given: Sequence[str]) -> dict[str, float]:
    """``["red=0.7", "ball=0.3"]`` as word -> weight. Raises BadInput."""
    out: dict[str, float] = {}
    for text in given:
        word, sign, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not sign or not word.strip() or not math.isfinite(weight):
            raise BadInput(f"mixture holds {text!r}; write word=weight, such as red=0.7.")
        if word.strip() in out:
            raise BadInput(f"mixture holds {word.strip()!r} twice.")
        out[word.strip()] = weight
    if not any(out.values()):
        raise BadInput("mixture is empty, or all its weights are 0; give at least one word, such as red=0.7.")
    return out


def mixture_vectors(model: Model, mixture: Mapping[str, float]) -> dict[str, Tensor]:
    """The pseudo-word (d) of a mixture, per text encoder. Raises BadInput for a word that is not one token there."""
    norms, out = usual_norms(model), {}
    for tower in text_towers(model):
        mixed = torch.zeros(tower.table.shape[1], device=tower.table.device)
        for word, weight in mixture.items():
            if word.endswith(PIECE):
                token = tower.tokenizer.convert_tokens_to_ids(word.removesuffix(PIECE))
                if token is None or token == tower.tokenizer.unk_token_id:
                    raise BadInput(f"mixture: {tower.name} has no token {word!r}.")
            else:
                token = token_of(tower, word)
            mixed = mixed + weight * tower.table.detach()[token].float()
        out[tower.name] = mixed * norms[tower.name] / mixed.norm().clamp_min(1e-12)
    return out


# --- the system ------------------------------------------------------------------------------------------------------


@register
class Conceptor(Intervention):
    """In a generation: a mixture of words stands for one word of the prompt. As ``sfumato explain``: finds the mixture
    that stands for a concept (:meth:`examine`)."""

    CARD = Card(
        key="conceptor",
        title="The Hidden Language of Diffusion Models",
        authors="Chefer, Lang, Geva, Polosukhin, Shocher, Irani, Mosseri, Wolf",
        year=2023,
        arxiv="2306.00966",
        verb="explain",
        needs=("pictures", "noise_path", "differentiable_state"),
        defaults_from="section 3 and the authors' code; the template is shorter, theirs is 'a photo of a {}'",
        cost="to find: the pictures, then batch x 2 forward-equivalents per step and the checks; to use: nothing",
        not_reproduced="the human study; 27 photo templates for choosing words by CLIP (one here)",
        summary="finds the weighted words a concept is made of, and draws with them changed",
        example="conceptor:word=cube,mixture=[red=0.7|ball=0.3]",
    )

    class Params(cards.Params):
        word: str | None = Field(default=None, description="make: the word of the prompt that the mixture stands for")
        mixture: list[str] = Field(default=[], description="make: words with weights, as red=0.7")
        strength: float = Field(
            default=1.0, ge=0, le=1, description="make: from the word's own embedding (0) to the mixture (1)"
        )
        template: str = Field(default="a {}", description="explain: sentence in which the concept is learnt")
        dictionary: list[str] = Field(default=[], description="explain: words that may be used; none: all that are")
        exclude: list[str] = Field(
            default=[], description="explain: words that may not be used, besides those of the concept"
        )
        pieces: bool = Field(
            default=False, description="explain: also tokens that only begin words (the paper has all)"
        )
        candidates: int = Field(
            default=5000, ge=2, description="explain: so many words are kept, the nearest to the pictures for CLIP"
        )
        similar: float = Field(
            default=1.0, gt=0, le=1, description="explain: leave out words this similar to the concept for CLIP; 0.9 in"
            " the paper"
        )  # fmt: skip
        keep: int = Field(default=50, ge=1, description="explain: N, how many words the decomposition may rest on")
        sparsity: float = Field(default=0.001, ge=0, description="explain: weight of the sparsity loss")
        levels_count: Literal["paper", "alike"] = Field(
            default="paper",
            description="explain: how much each noise level counts: by its error, or alike (the mean of the errors' "
            "logarithms), which needs fewer steps where pictures are few",
        )
        coefficients: Literal["network", "free", "softmax"] = Field(
            default="network", description="explain: a network of the embeddings (the paper), or one number per word"
        )
        images: int = Field(default=100, ge=1, le=10_000, description="explain: how many pictures of it to make")
        checked: int = Field(default=20, ge=0, le=1000, description="explain: how many more to check with, 0 none")
        every: int = Field(default=50, ge=1, description="explain: steps between two checks")
        iterations: int = Field(default=500, ge=1, le=100_000, description="explain: how many steps of learning")
        rate: float = Field(default=1e-3, gt=0, le=10, description="explain: learning rate of AdamW")
        batch: int = Field(default=6, ge=1, description="explain: pictures per step")
        flip: bool = Field(default=True, description="explain: mirror pictures at random")
        clip: str = Field(default=DEFAULT_NET, description="explain: the CLIP that checks; built in, or a folder")

        @field_validator("mixture", mode="before")
        @classmethod
        def _pairs(cls, given: Any) -> Any:
            return [f"{word}={weight:g}" for word, weight in given.items()] if isinstance(given, dict) else given

        @field_validator("template")
        @classmethod
        def _holds_the_concept(cls, template: str) -> str:
            if template.count("{}") != 1:
                raise ValueError("it must hold {} once, where the concept goes")
            return template

    role = "conditioner"

    def __init__(self, vectors: Mapping[str, Tensor] | None = None, **given: Any):
        self.params = self.Params(**given)
        self.weights = read_mixture(self.params.mixture) if self.params.mixture else {}
        self._vectors = vectors
        self.activity = Coverage()

    def start(self, run: Run) -> None:
        """Puts the mixture in place of the word. Raises NoMatch for a word that no prompt has, BadInput without word
        and mixture."""
        word = self.params.word
        if word is None or (not self.weights and self._vectors is None):
            raise BadInput("conceptor draws with a mixture in place of a word: give word and mixture, as word=cube.")
        if any(isinstance(part, Conceptor) and part is not self and part.params.word == word for part in run.parts):
            raise Conflict(f"two mixtures stand for {word!r}; give conceptor once for each word.")
        words = Words(run.model)
        for k, prompt in enumerate(run.prompts):
            try:
                words.find(prompt, word)
                break
            except NoMatch:
                if k == len(run.prompts) - 1:
                    raise
        if self.strength == 0:
            return
        vectors = dict(self._vectors or mixture_vectors(run.model, self.weights))
        if self.strength < 1:
            for tower in text_towers(run.model):
                own = tower.table.detach()[token_of(tower, word)].float()
                vectors[tower.name] = torch.lerp(own, vectors[tower.name].to(own), self.strength)
        run.enter(pseudo_word(run.model, word, vectors))
        self.mark(tokens=[word])

    def examine(
        self, model: Model, what: Any, prompt: str | None = None, on_step: Any = None, **options: Any
    ) -> Decomposition:
        """:func:`decompose` with this system's parameters. ``what``: a text, a picture, or a folder of pictures."""
        p = self.params.model_dump()
        if p.pop("word") is not None or p.pop("mixture"):
            raise BadInput("word and mixture of conceptor are for make; explain finds the mixture.")
        del p["strength"]
        folder = Path(what) if isinstance(what, str | Path) else None
        if folder is not None and folder.is_dir():
            given = [files.read_picture(path) for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURES]
            if not given:
                raise BadInput(f"{folder} holds no picture.")
        elif folder is not None and (isinstance(what, Path) or folder.suffix.lower() in PICTURES):
            given = [files.read_picture(folder)]
        elif isinstance(what, Image.Image):
            given = [what]
        else:
            return decompose(model, str(what), on_step=on_step, **p, **options)
        return decompose(model, prompt or "", pictures=given, on_step=on_step, **p, **options)


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


# --- a decomposition -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Decomposition:
    """What a concept is made of.

    ``names`` (m) and ``alphas`` (m), at least 0, in no particular scale; ``keep`` is N. ``history``: (iteration, loss,
    sparsity loss, effective number of words); ``checks``: (iteration, CLIP similarity of checked pictures).
    ``pictures`` of the concept and ``drawn`` by the N words from the same seeds, a few.
    """

    concept: str
    template: str
    model: str
    names: tuple[str, ...]
    alphas: Tensor
    keep: int
    history: tuple[tuple[int, float, float, float], ...] = ()
    checks: tuple[tuple[int, float], ...] = ()
    pictures: list[Image.Image] = field(default_factory=list)
    drawn: list[Image.Image] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def shares(self, n: int | None = None) -> list[tuple[str, float]]:
        """The ``n`` (N) largest coefficients as shares of what these n have, largest first; zeros are left out."""
        top = self.alphas.argsort(descending=True, stable=True)[: self.keep if n is None else n]
        total = self.alphas[top].sum().clamp_min(1e-12)
        return [(self.names[i], float(self.alphas[i] / total)) for i in top.tolist() if self.alphas[i] > 0]

    def mixture(self, n: int | None = None) -> list[str]:
        """:meth:`shares` as ``["red=0.7", ...]``, for :class:`Conceptor` and the command line."""
        return [f"{name}={share:.4g}" for name, share in self.shares(n)]

    def rank(self, name: str) -> int:
        """The place of a word, from 1. Raises UnknownName for one that was not in the dictionary."""
        if name not in self.names:
            raise UnknownName("word", name, self.names)
        return int((self.alphas > self.alphas[self.names.index(name)]).sum()) + 1

    @property
    def effective(self) -> float:
        """exp(entropy): how many words the coefficients are spread over."""
        return effective_number(self.alphas)

    def changed(self, **factors: float) -> Decomposition:
        """The same with the coefficients of some words multiplied (0: without them). Raises UnknownName."""
        alphas = self.alphas.clone()
        for name, factor in factors.items():
            if name not in self.names:
                raise UnknownName("word", name, [each for each, _ in self.shares()])
            alphas[self.names.index(name)] *= factor
        return replace(self, alphas=alphas, drawn=[], vectors={})

    def draw(
        self, model: Model, seeds: Sequence[int], *, keep: int | None = None, word: str = "", **options: Any
    ) -> Tensor:
        """Pictures (b 3 H W) by the ``keep`` (N) words in the template, one per seed; ``options`` of the loop."""
        slot = word or _carrier(model, self.template)
        system = Conceptor(word=slot, mixture=self.mixture(keep))
        prompts = [self.template.format(slot)] * len(seeds)
        made = generate(model, prompts, seed=list(seeds), interventions=system, **options)
        assert made.pixels is not None
        return made.pixels.detach()

    # -- on disk -------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything but pictures and vectors, as plain values."""
        chosen = [(name, round(share, 6)) for name, share in self.shares()]
        return {
            "format": FORMAT, "concept": self.concept, "template": self.template, "model": self.model,
            "keep": self.keep, "effective": round(self.effective, 3), "words": chosen,
            "all": dict(zip(self.names, [round(a, 6) for a in self.alphas.tolist()], strict=True)),
            "dictionary": hashlib.sha256("\n".join(self.names).encode()).hexdigest()[:16],
            "history": [list(row) for row in self.history], "checks": [list(row) for row in self.checks], **self.facts,
        }  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> Decomposition:
        """From the JSON that :meth:`save` wrote; without pictures. Raises BadInput for anything else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError
            alphas = torch.tensor([float(a) for a in data["all"].values()])
            rows = tuple(tuple(row) for row in data["history"]), tuple(tuple(row) for row in data["checks"])
            names = tuple(map(str, data["all"]))
            return cls(data["concept"], data["template"], data["model"], names, alphas, int(data["keep"]), *rows)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{path} holds no decomposition of this version ({FORMAT}), or it is damaged.") from None

    def report(self) -> Report:
        """A page: the words as a cloud and a table, pictures of the concept above what the words draw."""
        figures = [Figure("effective words", self.effective, "exp(entropy) of the coefficients")]
        if self.checks:
            best = max(similarity for _, similarity in self.checks)
            figures.append(Figure("similarity", best, "CLIP, mean over pairs of pictures, best check"))
        tables = [Table("words", ("word", "share"), [(name, f"{share:.3f}") for name, share in self.shares(20)])]
        gallery = [(f"pictures of {self.concept or 'the concept'}", [("", image) for image in self.pictures])]
        gallery.append((f"drawn by the {min(self.keep, len(self.names))} words", [("", image) for image in self.drawn]))
        notes = [f'to draw with it: --with "conceptor:word=WORD,mixture=[{"|".join(self.mixture(10))}]"']
        return Report(
            title=f"What {self.model} makes {self.concept or 'these pictures'} of",
            figures=figures,
            notes=notes,
            tables=tables,
            plots={"words": word_cloud(self.shares(40))},
            gallery=[(head, shown) for head, shown in gallery if shown],
            data={"decomposition": self.to_json()},
        )

    def save(self, folder: str | Path, name: str = "") -> list[Path]:
        """Writes the report (HTML and JSON), the decomposition (``NAME.json``) and the pseudo-word as a textual
        inversion (``NAME.safetensors``, read by diffusers' ``load_textual_inversion``). Returns the files."""
        folder, name = Path(folder), name or f"conceptor-{files.slug(self.concept or 'pictures')}"
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        with files.replacing(folder / f"{name}.json") as file:
            file.write((json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())
        written.append(folder / f"{name}.json")
        with files.replacing(folder / f"{name}.html") as file:
            file.write(self.report().html().encode())
        written.append(folder / f"{name}.html")
        if self.vectors:
            tensors = textual_inversion(self.vectors, f"<{files.slug(self.concept)}>")
            written.append(files.save_tensors(folder / f"{name}.safetensors", tensors))
        return written


def textual_inversion(vectors: Mapping[str, Tensor], placeholder: str) -> dict[str, Tensor]:
    """Vectors (d) by text encoder in the dialect of textual-inversion files: by placeholder for one encoder, by
    ``clip_l``, ``clip_g`` and ``t5`` for several."""
    known = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5"}
    keys = {name: placeholder if len(vectors) == 1 else known[name] for name in vectors}
    return {keys[name]: vector.detach().cpu()[None].contiguous() for name, vector in vectors.items()}


def effective_number(alphas: Tensor) -> float:
    """exp(entropy) of coefficients (m) as shares."""
    share = alphas.double() / alphas.double().sum().clamp_min(1e-30)
    return float((-(share * share.clamp_min(1e-30).log()).sum()).exp())


# --- finding it ------------------------------------------------------------------------------------------------------


class _Network(nn.Module):
    """alpha = |f(w)|: one hidden layer of 100."""

    def __init__(self, width: int, kind: str, words: int, seed: int):
        super().__init__()
        self.kind = kind
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(width, 100), nn.ReLU(), nn.Linear(100, 1))
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
    rate: float = 1e-3,
    batch: int = 6,
    flip: bool = True,
    clip: str = DEFAULT_NET,
    seed: int = 1024,
    on_step: Callable[[int, int], None] | None = None,
    **drawing: Any,
) -> Decomposition:
    """Decompose a concept into words of the model's vocabulary.

    Args:
        concept: the word or phrase; its pictures are made by the model itself and its own words are not used.
        pictures: pictures of the concept instead (PIL, or (b 3 H W) in [-1, 1]); one is allowed. Those from number
            ``images`` on are for checking; ``seeds`` of these, where the model made them, pair the checks.
        dictionary: words that may be used (those of :func:`dictionary` by default).
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
    known = dictionary if isinstance(dictionary, Dictionary) else _dictionary(model, dictionary, pieces)
    norms = usual_norms(model)
    slot = _carrier(model, template)
    height, width = model.default_size
    size = drawing.get("size") or (width, height)
    own: set[str] = set(exclude)
    if pictures is None:
        own |= {word.lower().strip(".,") for word in concept.split()}
        count, told = images + checked, template.format(concept)
        made = generate(model, [told] * count, seed=[seed + i for i in range(count)], batch_size=25, **drawing)
        pixels, seeds = made.pixels.detach().clamp(-1, 1), [seed + i for i in range(count)][images:]  # type: ignore[union-attr]
    else:
        pixels = pictures if isinstance(pictures, Tensor) else _pixels(pictures, size)
        if len(pixels) <= images:
            images, checked = len(pixels), 0 if not checked else min(checked, len(pixels))
    rest = pixels[images:][:checked] if len(pixels) > images else pixels[:checked]
    checks_with = list(seeds)[: len(rest)] if seeds else [seed + 7919 + i for i in range(len(rest))]
    pixels = pixels[:images]
    net = clip_net(clip) if len(rest) or similar < 1 or len(known.names) > candidates else None
    known = _chosen(known, own, net, pixels, template, concept, similar, candidates)
    tables = list(known.tables.values())
    inputs = torch.cat(tables, 1)

    network = _Network(inputs.shape[1], coefficients, len(known.names), seed).to(inputs.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        latents = [_encoded(model, pixels), _encoded(model, pixels.flip(-1)) if flip else None]
    scheduler = model.make_scheduler(None if model.flow else "ddim")
    model.timesteps(scheduler, 10, size[1], size[0])
    path = NoisePath(scheduler)
    levels = int(scheduler.config.num_train_timesteps)
    target_features = net.features(as_pictures(rest)) if net is not None and len(rest) else None

    history: list[tuple[int, float, float, float]] = []
    checks: list[tuple[int, float]] = []
    best: tuple[float, Tensor] | None = None
    with frozen(model), torch.enable_grad():
        for k in range(iterations):
            rows = torch.randint(len(pixels), (batch,), generator=generator)
            x0 = latents[0][rows]
            if latents[1] is not None:
                mirrored = torch.rand(batch, generator=generator) < 0.5
                x0 = torch.where(mirrored.view(-1, 1, 1, 1).to(x0.device), latents[1][rows], x0)
            noise = torch.randn(x0.shape, generator=generator).to(x0)
            # stratified, one from each of as many equal parts: far less noise than independent draws
            t = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * (levels - 1)
            t = (t.long() + 1).to(x0.device)
            alphas = network(inputs)
            vectors = known.vectors(alphas, norms)
            with pseudo_word(model, slot, vectors):
                condition = model.encode_text(template.format(slot), guidance=False).rows([0] * batch)
            x = path.add_noise(x0, noise, t)
            guess = model.predict(x.to(model.dtype), t, condition, "cond").float()
            errors = (guess - path.from_x0(x, x0, t)).square().mean((1, 2, 3))
            loss = errors.mean() if levels_count == "paper" else errors.log().mean()
            few = _top(alphas, keep)
            parts = known.vectors(few, norms)
            sparse = torch.stack([1 - torch.cosine_similarity(parts[n], vectors[n], dim=0) for n in parts]).mean()
            gradients = torch.autograd.grad(loss + sparsity * sparse, list(network.parameters()), allow_unused=True)
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            history.append((k, float(loss.detach()), float(sparse.detach()), effective_number(alphas.detach())))
            if target_features is not None and net is not None and ((k + 1) % every == 0 or k + 1 == iterations):
                with torch.no_grad():
                    alphas = network(inputs).detach()
                    drawn = _drawn(
                        model, template, slot, known.vectors(_top(alphas, keep), norms), checks_with, drawing
                    )
                similarity = _paired(net.features(as_pictures(drawn)), target_features, bool(seeds))
                checks.append((k + 1, similarity))
                if best is None or similarity > best[0]:
                    best = (similarity, alphas.cpu())
            if on_step is not None:
                on_step(k + 1, iterations)
    alphas = best[1] if best is not None else network(inputs).detach().cpu()
    with torch.no_grad():
        vectors = known.vectors(_top(alphas.to(inputs), keep), norms)
        shown = _drawn(
            model, template, slot, vectors, (checks_with or [seed + 7919 + i for i in range(8)])[:8], drawing
        )
    facts = {"hash": model.weight_hash, "seed": seed, "iterations": iterations, "coefficients": coefficients}
    return Decomposition(
        concept, template, model.name, known.names, alphas, keep, tuple(history), tuple(checks),
        as_pictures(rest[:8] if len(rest) else pixels[:8]), as_pictures(shown), facts, vectors,
    )  # fmt: skip


def _dictionary(model: Model, words: Sequence[str], pieces: bool) -> Dictionary:
    known = dictionary(model, pieces)
    if not words:
        return known
    for word in words:
        if word not in known.names:
            raise UnknownName("word of the dictionary", word, known.names)
    return known.only([known.names.index(word) for word in dict.fromkeys(words)])


def _chosen(
    known: Dictionary,
    own: set[str],
    net: Any,
    pixels: Tensor,
    template: str,
    concept: str,
    similar: float,
    candidates: int,
) -> Dictionary:
    """The dictionary without the concept's own words, without words too similar to it, and cut to ``candidates``."""
    keep = [i for i, name in enumerate(known.names) if name.removesuffix(PIECE) not in own]
    if not keep:
        raise NoMatch(f"the dictionary holds nothing but the concept's own words: {', '.join(sorted(own))}.")
    if net is not None and (similar < 1 or len(keep) > candidates):
        texts = torch.from_numpy(net.texts([template.format(known.names[i].removesuffix(PIECE)) for i in keep]))
        texts = F.normalize(texts, dim=1)
        if similar < 1 and concept:
            told = F.normalize(torch.from_numpy(net.texts([template.format(concept)])), dim=1)[0]
            near = texts @ told > similar
            keep, texts = [i for i, no in zip(keep, near.tolist(), strict=True) if not no], texts[~near]
            if not keep:
                raise NoMatch(f"every word is more similar to the concept than similar={similar:g} allows.")
        if len(keep) > candidates:
            seen = F.normalize(torch.from_numpy(net.features(as_pictures(pixels))), dim=1).mean(0)
            order = (texts @ seen).argsort(descending=True, stable=True)[:candidates]
            keep = [keep[i] for i in sorted(order.tolist())]
    return known.only(keep)


def _carrier(model: Model, template: str) -> str:
    """A word of one token in every encoder that the template does not hold: the slot for pseudo-words."""
    told = set(re.findall(r"\w+", template.lower()))
    for name in dictionary(model).names:
        if name not in told and name.isascii() and len(name) > 2:
            return name
    raise NotSupported(f"{model.name} has no word of one token to serve as a slot.")


def _top(alphas: Tensor, n: int) -> Tensor:
    """Coefficients (m) with all but the ``n`` largest set to 0."""
    if n >= len(alphas):
        return alphas
    floor = alphas.topk(n).indices
    return alphas * torch.zeros_like(alphas).index_fill(0, floor, 1.0)


def _pixels(pictures: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """Pictures as (b 3 H W) in [-1, 1] of the model's size: middle part, resized."""
    from PIL import ImageOps

    from sfumato.models.features import as_tensor

    return as_tensor([ImageOps.fit(p.convert("RGB"), size, Image.Resampling.BICUBIC) for p in pictures])


def _encoded(model: Model, pixels: Tensor) -> Tensor:
    return torch.cat([model.encode_image(each).float() for each in pixels.split(25)])


def _drawn(
    model: Model, template: str, slot: str, vectors: Mapping[str, Tensor], seeds: Sequence[int], drawing: dict[str, Any]
) -> Tensor:
    system = Conceptor(vectors=vectors, word=slot)
    made = generate(model, [template.format(slot)] * len(seeds), seed=list(seeds), interventions=system, **drawing)
    assert made.pixels is not None
    return made.pixels.detach()


def _paired(ours: Any, theirs: Any, paired: bool) -> float:
    """Mean CLIP similarity of pictures (b d): each with its own where seeds pair them, else with the others' mean."""
    a, b = (F.normalize(torch.from_numpy(each), dim=1) for each in (ours, theirs))
    return float((a * b).sum(1).mean() if paired else (a @ F.normalize(b.mean(0), dim=0)).mean())


# --- using it --------------------------------------------------------------------------------------------------------


def explain_seed(
    model: Model,
    found: Decomposition,
    seed: int,
    *,
    keep: int | None = None,
    enough: float = 0.93,
    alike: float = 0.95,
    clip: str = DEFAULT_NET,
    **drawing: Any,
) -> Decomposition:
    """What one picture needs of a decomposition (section 4.2): words are taken out from the least on, each with words
    whose text is more than ``alike`` it for CLIP, and stay out where the picture of ``seed`` stays at least ``enough``
    similar for CLIP to what the whole decomposition draws; passes are repeated until none takes a word out."""
    net = clip_net(clip)
    top = found.alphas.argsort(descending=True, stable=True)[: found.keep if keep is None else keep].tolist()
    alphas = torch.zeros_like(found.alphas)
    alphas[top] = found.alphas[top]
    texts = F.normalize(
        torch.from_numpy(net.texts([found.template.format(found.names[i].removesuffix(PIECE)) for i in top])), dim=1
    )
    near = texts @ texts.T > alike

    def seen(coefficients: Tensor) -> tuple[Tensor, Tensor]:
        pixels = replace(found, alphas=coefficients).draw(model, [seed], **drawing)
        return F.normalize(torch.from_numpy(net.features(as_pictures(pixels))), dim=1)[0], pixels

    target, first = seen(alphas)
    last, removed = first, True
    while removed:
        removed = False
        for k in range(len(top) - 1, -1, -1):
            if alphas[top[k]] == 0:
                continue
            tried = alphas.clone()
            tried[[top[j] for j in range(len(top)) if near[k, j] or j == k]] = 0
            if not tried.any():
                continue
            features, pixels = seen(tried)
            if float(features @ target) >= enough:
                alphas, last, removed = tried, pixels, True
    return replace(found, alphas=alphas, pictures=as_pictures(first), drawn=as_pictures(last), vectors={})


@dataclass(frozen=True)
class Balance:
    """What :func:`balance` found: the ``factor``, the ``decomposition`` with it, the measured share, and all (factor,
    share) it tried."""

    factor: float
    share: float
    decomposition: Decomposition
    tried: tuple[tuple[float, float], ...]


def balance(
    model: Model,
    found: Decomposition,
    words: Sequence[str],
    measure: Callable[[Tensor], float],
    *,
    seeds: Sequence[int],
    target: float = 0.5,
    tolerance: float = 0.05,
    most: float = 4.0,
    rounds: int = 8,
    **drawing: Any,
) -> Balance:
    """The factor on the coefficients of ``words`` at which ``measure(pixels (b 3 H W))``, a share that grows with them,
    is ``target`` (section 5, bias mitigation): bisection from 0 to ``most``, on pictures of ``seeds``.

    Raises NoMatch when even the ends do not reach the target.
    """

    def at(factor: float) -> float:
        changed = found.changed(**dict.fromkeys(words, factor))
        return measure(changed.draw(model, seeds, **drawing))

    tried = [(0.0, at(0.0)), (1.0, at(1.0))]
    low, high = (0.0, 1.0) if tried[1][1] >= target else (1.0, most)
    if tried[0][1] > target + tolerance:
        raise NoMatch(f"without {' and '.join(words)} the share still is {tried[0][1]:.2f}; other words carry it too.")
    for _ in range(rounds):
        factor, share = min(tried, key=lambda each: abs(each[1] - target))
        if abs(share - target) <= tolerance:
            break
        middle = (low + high) / 2
        tried.append((middle, at(middle)))
        low, high = (low, middle) if tried[-1][1] >= target else (middle, high)
    factor, share = min(tried, key=lambda each: abs(each[1] - target))
    return Balance(factor, share, found.changed(**dict.fromkeys(words, factor)), tuple(tried))


def word_cloud(shares: Sequence[tuple[str, float]], size: tuple[int, int] = (640, 360)) -> Image.Image:
    """Words as large as their shares, the largest in the middle, the others around it without overlap."""
    width, height = size
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    taken: list[tuple[float, float, float, float]] = []
    top = max((share for _, share in shares), default=1.0)
    for k, (word, share) in enumerate(shares):
        font = ImageFont.load_default(size=max(11, round(64 * math.sqrt(share / top))))
        left, up, right, down = draw.textbbox((0, 0), word, font=font)
        w, h = right - left, down - up
        for turn in range(1500):  # along a spiral
            angle, reach = 0.31 * turn, 0.7 * 0.31 * turn
            x, y = width / 2 + 1.6 * reach * math.cos(angle) - w / 2, height / 2 + reach * math.sin(angle) - h / 2
            box = (x - 3, y - 3, x + w + 3, y + h + 3)
            inside = x >= 0 and y >= 0 and x + w <= width and y + h <= height
            if inside and all(box[0] >= b[2] or box[2] <= b[0] or box[1] >= b[3] or box[3] <= b[1] for b in taken):
                shade = round(30 + 130 * min(1.0, k / 30))
                draw.text((x - left, y - up), word, font=font, fill=(shade // 3, shade // 2, shade))
                taken.append(box)
                break
    return canvas
