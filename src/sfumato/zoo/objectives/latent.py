"""What the latent text-to-image objectives share: cached latents, the frozen text tower, prompts, sample grids."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from string import Template
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL.Image import Image
from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from sfumato import registry, sheets
from sfumato.arrays import to_tensor
from sfumato.errors import BadInput, UnknownName
from sfumato.models import Model
from sfumato.models.weights import find_weights, hash_files
from sfumato.ondemand import Spec, Store
from sfumato.toybox import ToyboxDataset, sample_scene
from sfumato.toybox import caption as describe
from sfumato.toybox.oracle.presence import check, requested_toys
from sfumato.toybox.oracle.toy_judge import load_judge
from sfumato.training import data
from sfumato.training.draw import Draw
from sfumato.training.losses import stratified
from sfumato.training.objective import Objective
from sfumato.training.recipe import Section
from sfumato.windows import Window
from sfumato.zoo.objectives import labels
from sfumato.zoo.objectives.foreign_context import other_words, word_kinds
from sfumato.zoo.objectives.repa import PROBED, Teacher, repa_loss
from sfumato.zoo.objectives.vital_signs import Signs, vital_signs

GRID_PROMPTS = (
    "a red ball on the grass",
    "a large blue cube on the sand",
    "a yellow cone on the snow",
    "a green cylinder on the wood",
    "a small purple ring on the tiles",
    "a large orange striped ball on the grass by day",
    "a white dotted cube on the wood at sunset",
    "a black cross on the snow in the fog",
    "a large red checkered cylinder on the sand at night",
    "a red ball and a blue cube",
    "a green cone to the left of a yellow ball on the sand",
    "a large blue ring behind a small red cube on the grass",
    "a purple ball and an orange cylinder on the snow",
    "a white cone to the right of a black cube on the wood",
    "a red cube, a green ball and a blue cone on the tiles",
    "the grass at sunset",
)


class LatentModel(Section):
    """What every latent text-to-image model names in its ``[model]`` section."""

    vae: str = Field("toy-vae", description="zoo name or folder of the autoencoder")
    text: str = Field("toy-clip", description="zoo name or folder of the CLIP model whose text tower is used")
    text_rate: float = Field(0.0, ge=0, description="learning rate of the text tower beside the denoiser's, 0 = frozen")
    teacher: str = Field("toy-clip", description="zoo name or folder of the CLIP whose picture tower REPA aligns with")


class LatentLoss(Section):
    """The shared part of the ``[loss]`` section."""

    toy_weight: float = Field(
        3.0,
        gt=0,
        description="weight of latents under a toy beside those of the background, as far as noise lets it be seen"
        " (place_weights)",
    )
    empty: float = Field(0.1, ge=0, le=1, description="share of empty prompts, for classifier-free guidance")
    colorless: float = Field(
        0.0, ge=0, le=1, description="share of the toys whose colour the training captions do not tell"
    )
    foreign_context: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the training captions in which what a word lends to all others is another word's"
        " (foreign_context.py), so that what a word says is read at the word",
    )
    interval: Window = Field(
        (0.0, 1.0),
        description="share of the noise distribution to train on, from none (0) to pure noise (1); less than all of it"
        " makes an expert (Balaji et al. 2022)",
    )
    align: float = Field(
        0.0,
        ge=0,
        description="weight of telling from features in the middle of the network what lies where: representation"
        " alignment (Yu et al. 2024) with the truth in the place of another network's features",
    )
    repa: float = Field(
        0.0, ge=0, description="weight of representation alignment with the picture features of the teacher (repa.py)"
    )


def zoo_folder(name: str) -> Path:
    """The folder of a built-in model, or ``name`` itself when it is a folder.

    Raises:
        UnknownName: neither.
    """
    found = registry.find(name) or Path(name)
    if not found.is_dir():
        raise UnknownName("built-in model or folder", name, registry.names())
    return found


def codec_shape(vae: str, size: int) -> tuple[int, int]:
    """Channels and side of the latents that the autoencoder ``vae`` (zoo name or folder) makes of pictures of ``size``
    pixels, from its configuration alone."""
    config = AutoencoderKL.load_config(zoo_folder(vae))
    return int(config["latent_channels"]), size // 2 ** (len(config["block_out_channels"]) - 1)


def _key(folder: Path) -> str:
    """What stands for the weights in a component's folder in names of what was computed with them."""
    return hash_files([("", file) for file in find_weights(folder)])[:16]


def _cached(kind: str, name: str, n: int, shape: tuple[int, ...], make: Callable[[np.ndarray], Any]) -> Any:
    """``n`` rows of ``shape``, float16, each made by ``make`` when it is first read and kept on disk."""
    path = registry.cache_folder() / kind / f"{name}.npy"
    return Store(n, {kind: Spec(path, shape, np.float16)}, path.with_suffix(".unfinished"), make).rows(kind)


class LatentObjective(Objective):
    """Base of :class:`DiffusionObjective` and :class:`FlowObjective`."""

    Model: ClassVar[type[Section]] = LatentModel
    Loss: ClassVar[type[Section]] = LatentLoss
    align_cell = 1  # side in latents of the places that the aligned features stand for
    sampling: ClassVar[dict[str, Any]]  # the card's sampling defaults
    plain: ClassVar[str]  # code that draws with diffusers alone; NAME and SIDE are the recipe's
    signs: Signs | None = None  # the vital signs, once measured
    repa_teacher: Teacher | None = None  # what REPA aligns with, where it is asked for
    taught: dict[ToyboxDataset, Any]  # what it makes of the pictures

    def latent_shape(self) -> tuple[int, int]:
        """Channels and side of the latents."""
        return codec_shape(self.model_options.vae, self.recipe.data.size)

    def build_text(self) -> None:
        """Takes the text tower and the tokenizer from the CLIP model."""
        folder = zoo_folder(self.model_options.text)
        clip = CLIPModel.from_pretrained(folder, dtype=torch.float32)
        self.text = CLIPTextModelWithProjection(clip.config.text_config)
        self.text.text_model.load_state_dict(clip.text_model.state_dict())
        self.text.text_projection.load_state_dict(clip.text_projection.state_dict())
        self.text.eval().requires_grad_(self.model_options.text_rate > 0)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.kinds = word_kinds(self.tokenizer)
        self.rates = {"text": self.model_options.text_rate}

    def build_readout(self, width: int) -> dict[str, nn.Module]:
        """The linear read-out of the alignment loss asked for, if any; it trains along and is not exported.

        Raises BadInput: both are asked for, which read different features.
        """
        readouts: dict[str, nn.Module] = {}
        if self.loss_options.align and self.loss_options.repa:
            raise BadInput("recipe keys loss.align and loss.repa align the same features with two things; give one.")
        if self.loss_options.align:
            readouts["readout"] = nn.Linear(width, labels.PLACE_CLASSES)
        if self.loss_options.repa:
            self.repa_teacher = Teacher(zoo_folder(self.model_options.teacher))
            readouts["repa_readout"] = nn.Linear(width, self.repa_teacher.width)
        return readouts

    @contextlib.contextmanager
    def watching(self, layer: nn.Module) -> Iterator[list[Any]]:
        """Within: what ``layer`` returned, one entry a call."""
        outputs: list[Any] = []
        handle = layer.register_forward_hook(lambda _, __, out: outputs.append(out))
        try:
            yield outputs
        finally:
            handle.remove()

    def alignment(self, features: Tensor, places: Tensor) -> Tensor:
        """Loss (b,) of the read-out of ``features`` (b, h, w, width) against labels (b, classes, h, w)."""
        return labels.place_loss(self.modules["readout"](features).permute(0, 3, 1, 2), places)

    def repa(self, features: Tensor, batch: dict[str, Tensor], weight: Tensor) -> Tensor:
        """The loss of :mod:`.repa` of features (b, h, w, width) whose places weigh ``weight`` (b, 1, h', w')."""
        return repa_loss(self.modules["repa_readout"](features), batch["teacher"], weight)

    def place_weights(self, batch: dict[str, Tensor], signal: Tensor) -> Tensor:
        """Weights of the places of a batch (b, 1, h, w), mean 1, of which ``signal`` (b) is the share that noise left.

        A weight that knows what is still to be foretold moves the mean that is learnt: toys that weigh three times as
        much wherever they may lie are foretold as if they were three times as likely, and drawn twice or too wide. So
        ``toy_weight`` counts as far as one sees what lies there.
        """
        weight = 1 + (self.loss_options.toy_weight - 1) * signal.float().view(-1, 1, 1, 1) * batch["toys"]
        return weight / weight.mean()

    def setup(self, device: torch.device) -> None:
        super().setup(device)
        vae = zoo_folder(self.model_options.vae)
        self.vae = AutoencoderKL.from_pretrained(vae).to(device).eval().requires_grad_(False)
        self.vae.register_to_config(_name_or_path=vae.name)  # exports name no folder of this machine
        self.text.to(device)
        self.key = _key(vae)
        self.train_latents = self.cached_latents(self.train_data)
        self.val_latents = self.cached_latents(self.val_data)
        if self.repa_teacher is not None:
            self.repa_teacher.tower.to(device)
            self.taught = {source: self.cached_features(source) for source in (self.train_data, self.val_data)}
            self.repa_teacher.probe(to_tensor(self.taught[self.train_data][:PROBED]).float())

    def cached_latents(self, source: ToyboxDataset) -> Any:
        """Latents (n, c, h, w) float16 of every picture, by posterior mean, scaled; each encoded when it is first read
        and kept on disk."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = (self.vae.config.latent_channels, *[self.recipe.data.size // factor] * 2)
        return _cached("latents", f"{source.folder.name}-{self.key}", len(source), shape, partial(self._encode, source))

    def cached_features(self, source: ToyboxDataset) -> Any:
        """What REPA's teacher makes of every picture (n, h, w, width), float16; kept as latents are."""
        teacher = self.repa_teacher
        assert teacher is not None
        key = _key(zoo_folder(self.model_options.teacher))

        def look(rows: np.ndarray) -> dict[str, np.ndarray]:
            found = teacher.patches(data.pictures(source, to_tensor(rows)).to(self.device))
            return {"features": found.half().cpu().numpy()}

        shape = (teacher.cells, teacher.cells, teacher.width)
        return _cached("features", f"{source.folder.name}-{key}", len(source), shape, look)

    @torch.no_grad()
    def _encode(self, source: ToyboxDataset, rows: np.ndarray) -> dict[str, np.ndarray]:
        z = self.vae.encode(data.pictures(source, to_tensor(rows)).to(self.device)).latent_dist.mean
        return {"latents": (z * self.vae.config.scaling_factor).half().cpu().numpy()}

    def draw_latents(self, source: ToyboxDataset, latents: Any, indices: Tensor, draw: Draw) -> dict[str, Tensor]:
        """x0, noise (b, c, h, w), where toys are (b, 1, h, w) and token ids (b, t) of a batch."""
        x0 = to_tensor(latents[indices.numpy()]).float()
        noise = torch.randn(x0.shape, generator=draw.generator("noise"))
        texts = self.captions(source, indices, draw)
        empty = torch.rand(len(texts), generator=draw.generator("empty")) < self.loss_options.empty
        texts = ["" if dropped else text for text, dropped in zip(texts, empty.tolist(), strict=True)]
        toys = data.toy_cells(source, indices, x0.shape[-1])
        batch = {"x0": x0, "noise": noise, "toys": toys, "tokens": self.tokens(texts)}
        if self.loss_options.foreign_context:
            rng = np.random.default_rng(draw.number("foreign context"))
            batch["foreign"] = other_words(batch["tokens"], self.kinds, self.loss_options.foreign_context, rng)
        if self.loss_options.align:
            batch["places"] = labels.place_labels(source, indices, x0.shape[-1] // self.align_cell)
        if self.repa_teacher is not None:
            batch["teacher"] = self.repa_teacher.standardised(to_tensor(self.taught[source][indices.numpy()]).float())
        return batch

    def quantiles(self, n: int, draw: Draw) -> Tensor:
        """Places (n,) in the noise distribution: one from each of n equal parts of the interval, in random order."""
        return stratified(n, draw.generator("time"), draw.generator("order"), self.loss_options.interval)

    def timestep(self, quantile: float) -> float:
        """The timestep, 0 to 1000, below which this share of the noise distribution lies."""
        raise NotImplementedError

    @property
    def expert(self) -> bool:
        """Whether only a part of the noise distribution is trained on."""
        return tuple(self.loss_options.interval) != (0.0, 1.0)

    def facts(self) -> dict[str, Any]:
        """What the card says: how to draw, here and with diffusers alone; of an expert whose it is, and its timesteps
        from the first to below the last; of the inside what was measured."""
        side = self.recipe.data.size
        plain = Template(self.plain).substitute(self.sampling, name=self.recipe.name, side=side)
        facts: dict[str, Any] = {"sampling": dict(self.sampling), "plain": plain}
        if self.expert:
            timesteps = [round(self.timestep(quantile), 3) for quantile in self.loss_options.interval]
            facts["expert"] = {"of": self.recipe.init_from, "timesteps": timesteps}
        return {**facts, "vital_signs": self.signs} if self.signs else facts

    def look_inside(self) -> None:
        """Measures the vital signs, which the card then holds."""
        judge = load_judge() if registry.find("toy-judge") else None
        self.signs = vital_signs(Model(self.pipeline(), card={"sampling": self.sampling}), judge)

    def captions(self, source: ToyboxDataset, indices: Tensor, draw: Draw) -> list[str]:
        """Captions of the pictures of a batch."""
        return data.captions(source, indices, draw, self.loss_options.colorless)

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids (b, t) int64, padded to the full length as the pipelines do."""
        return self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def batch(self, draw: Draw) -> dict[str, Tensor]:
        indices = draw.indices(len(self.train_data), self.recipe.train.batch)
        return self.draw_latents(self.train_data, self.train_latents, indices, draw)

    def evaluate(self, n: int = 256) -> dict[str, float]:
        """The denoising loss on held-out scenes with fixed noise."""
        total = 0.0
        parts = torch.arange(min(n, len(self.val_data))).split(64)
        for number, part in enumerate(parts):
            draw = Draw(2, number)
            batch = self.draw_latents(self.val_data, self.val_latents, part, draw)
            _, logs = self.loss({key: value.to(self.device) for key, value in batch.items()}, draw)
            total += float(logs["denoise"]) * len(part)
        return {"held_out_loss": total / min(n, len(self.val_data))}

    def measure(self, n: int = 200) -> dict[str, float]:
        """Beside the loss: the share of pictures whose toys have the shape and colour asked for, for one toy, two, and
        one whose colour is not told; of the first two, the share with as many toys as asked for. By the toy-judge.

        ``n`` captions of unseen scenes each, with the card's sampling defaults; nothing is added when no toy-judge is
        there yet. The vital signs are measured too, for the card.
        """
        quality = self.evaluate()
        if self.expert or self.recipe.data.folder:  # an expert alone draws nothing, and the judge knows toys
            return quality
        self.look_inside()
        if registry.find("toy-judge") is None:
            return quality
        judge, counted = load_judge(), []
        asked = ((1, 0.0, "one_toy_right"), (2, 0.0, "two_toys_right"), (1, 1.0, "colorless_toy_right"))
        for toys, colorless, name in asked:
            scenes = [sample_scene(np.random.default_rng((3, toys, i)), toys) for i in range(n)]
            dice = [np.random.default_rng((4, toys, i)) for i in range(n)]
            captions = [describe(scene, rng, "random", colorless) for scene, rng in zip(scenes, dice, strict=True)]
            hits = []
            for start in range(0, n, 40):
                part = captions[start : start + 40]
                pixels = self.sample([str(one) for one in part], seed=1000 * toys + start).clamp(-1, 1)
                checks = [check(r, requested_toys(one)) for r, one in zip(judge.read(pixels), part, strict=True)]
                hits += [one.all_bound for one in checks]
                counted += [one.counted for one in checks if not colorless]
            quality[name] = float(np.mean(hits))
        return {**quality, "right_number": float(np.mean(counted))}

    def pipeline(self) -> DiffusionPipeline:
        """The genuine pipeline around the modules in training."""
        raise NotImplementedError

    def sample(self, prompts: list[str], seed: int = 0) -> Tensor:
        """Pictures (b, 3, h, w) in [-1, 1] with the card's steps and guidance, one generator per prompt."""
        pipe = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        extra = {"max_sequence_length": 0} if "transformer" in pipe.components else {}
        out = pipe(
            prompts,
            num_inference_steps=self.sampling["steps"],
            guidance_scale=self.sampling["guidance"],
            generator=generators,
            output_type="pt",
            **extra,
        )
        return out.images.cpu() * 2 - 1

    def grid(self) -> Image | None:
        if self.expert:
            return None
        prompts = list(GRID_PROMPTS)
        if self.recipe.data.folder:
            captions = [self.val_data.caption(i).text for i in range(min(len(self.val_data), len(prompts)))]
            prompts = [captions[i % len(captions)] for i in range(len(prompts))]
        return sheets.sheet(self.sample(prompts), 8, scale=2, gap=0)
