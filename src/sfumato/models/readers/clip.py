"""CLIP: texts, pictures and noised latents in one space, to guide (with gradients) and to measure."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato import registry
from sfumato.errors import BadInput, BadWeights, NotSupported, UnknownName
from sfumato.models import Model, TruncatedPrompt, quiet
from sfumato.models.readers.loading import load_module, net_folder
from sfumato.models.readers.noised import PLANES, codec_hash, noise_level, noised_input
from sfumato.models.readers.preprocessing import Preprocessing
from sfumato.models.weights import find_weights, hash_files
from sfumato.once import once
from sfumato.valid import first_line

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

__all__ = ["DTYPES", "NOISED", "PLAIN", "Clip", "clip_for", "load_clip"]

PLAIN = "toy-clip"
NOISED = "toy-clip-noisy"
"""The built-in CLIPs: for pictures, and for the noised latents of toy-vae-128."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Clip:
    """A frozen ``transformers.CLIPModel``.

    To guide: :meth:`text`, :meth:`pictures`, :meth:`latents` are unit vectors, with gradients to pictures and latents.
    To measure: :meth:`features`, :meth:`text_features` are embeddings of PIL pictures and texts as arrays, projected
    but not normalised.

    ``hash``: SHA-256 of its weights. ``codec`` names the autoencoder whose noised latents it reads
    (:func:`~sfumato.models.readers.noised.codec_hash`), or is empty: then it reads pictures.
    """

    name: str
    model: Any
    tokenizer: Any
    preprocessing: Preprocessing
    hash: str = ""
    codec: str = ""

    @property
    def reads_noise(self) -> bool:
        """Whether it reads noised latents rather than pictures."""
        return bool(self.codec)

    @property
    def side(self) -> int:
        """The side of the square that it reads, in pixels or in latents."""
        return int(self.model.config.vision_config.image_size)

    @property
    def length(self) -> int:
        """The most tokens that its text tower reads."""
        return int(self.model.config.text_config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def scale(self) -> float:
        """What cosines are multiplied by to be logits, as learned."""
        return float(self.model.logit_scale.exp().clamp(max=100))

    @property
    def rule(self) -> str:
        """How pictures of other sizes are resized to be measured, in words."""
        return f"middle square, bicubic to {self.side}x{self.side}"

    @property
    def distance(self) -> str:
        """What the Frechet distance on its features is called."""
        return f"FD({self.name})"

    # -- to guide ------------------------------------------------------------------------------------------------------

    def text(self, texts: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
        """Unit vectors (m d) of texts. Several ``templates``, such as "a painting of {}", are averaged (Radford et al.
        2021, section 3.1.4). Warns TruncatedPrompt where a text is longer than the CLIP reads."""
        for template in templates:
            if "{}" not in template:
                raise BadInput(f"the template {template!r} of a CLIP text lacks {{}}, which stands for the text.")
        rows = []
        for template in templates:
            written = [template.replace("{}", text) for text in texts]
            tokens = self.tokenizer(written, padding="longest", return_tensors="pt").input_ids
            if tokens.shape[1] > self.length:
                warnings.warn(f"{self.name} reads {self.length} tokens of a text; the rest is cut.", TruncatedPrompt, 2)
                options = {"padding": "max_length", "truncation": True, "max_length": self.length}
                tokens = self.tokenizer(written, return_tensors="pt", **options).input_ids
            with torch.no_grad():
                pooled = self.model.text_model(input_ids=tokens.to(self.device)).pooler_output
                rows.append(F.normalize(self.model.text_projection(pooled), dim=-1))
        return F.normalize(torch.stack(rows).mean(0), dim=-1)

    def pictures(self, pixels: Tensor) -> Tensor:
        """Unit vectors (b d) of pictures (b 3 H W) in [-1, 1], stretched to the square that the CLIP reads."""
        self._refuse_pictures()
        return self._unit_vectors(self.preprocessing.tensor(pixels.to(self.device, torch.float32)))

    def latents(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """Unit vectors (b d) of noised latents ``x = alpha x0 + sigma eps`` (b c h w).

        Raises NotSupported for a CLIP of pictures, BadInput for latents of another number of channels.
        """
        if not self.reads_noise:
            raise NotSupported(f"{self.name} reads pictures, not noised latents; use a noise-aware CLIP ({NOISED}).")
        channels = self.model.config.vision_config.num_channels - PLANES
        if x.ndim != 4 or x.shape[1] != channels:
            raise BadInput(f"{self.name} reads latents (b, {channels}, h, w), got {tuple(x.shape)}.")
        x = x.to(self.device, torch.float32) / (alpha**2 + sigma**2) ** 0.5
        level = noise_level(alpha, sigma).to(x.device).expand(len(x))
        return self._unit_vectors(noised_input(x, level), interpolate=x.shape[-2:] != (self.side, self.side))

    def fits(self, model: Model) -> bool:
        """Whether it reads pictures, or noised latents of this model's autoencoder."""
        return not self.reads_noise or codec_hash(model.pipe.vae) == self.codec

    # -- to measure ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def features(self, pictures: Sequence[Image]) -> np.ndarray:
        """Embeddings (b, d) of PIL pictures of any size: of their centre squares."""
        self._refuse_pictures()
        pixels = self.preprocessing.pictures(pictures).to(self.device, self.model.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return self.model.visual_projection(pooled).float().cpu().numpy()

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings (b, d) of texts. Warns TruncatedPrompt of those that the text tower cannot read to the end."""
        whole = self.tokenizer(list(texts))["input_ids"]
        cut = sum(len(tokens) > self.length for tokens in whole)
        if cut:
            message = f"{self.name} reads {self.length} tokens: {cut} of {len(texts)} texts are longer and are cut off."
            warnings.warn(TruncatedPrompt(message), stacklevel=2)
        options = {"padding": True, "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        tokens = self.tokenizer(list(texts), **options).to(self.device)
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return self.model.text_projection(pooled).float().cpu().numpy()

    def _refuse_pictures(self) -> None:
        if self.reads_noise:
            raise NotSupported(f"{self.name} reads noised latents, not pictures; use a CLIP of pictures ({PLAIN}).")

    def _unit_vectors(self, inputs: Tensor, interpolate: bool = False) -> Tensor:
        out = self.model.vision_model(pixel_values=inputs, interpolate_pos_encoding=interpolate).pooler_output
        return F.normalize(self.model.visual_projection(out), dim=-1)


def load_clip(name: str | Path = PLAIN, dtype: str = "float32", device: torch.device | str = "cpu") -> Clip:
    """A CLIP by the name of a built-in one or the folder of a ``transformers.CLIPModel``, frozen.

    Raises:
        UnknownName: neither, or the dtype. BadWeights: the folder holds no CLIP, a pickle, or a damaged file.
    """
    built_in = [known for known in registry.names() if registry.card(known).get("objective") in ("clip", "noisy_clip")]
    folder = net_folder(name, "CLIP (a built-in one or a folder)", built_in)
    if dtype not in DTYPES:
        raise UnknownName("dtype", str(dtype), DTYPES)
    return _loaded(folder, dtype, str(device))


@once(4)
def _loaded(folder: Path, dtype: str, device: str) -> Clip:
    from transformers import AutoTokenizer, CLIPModel

    model = load_module(folder, DTYPES[dtype], device, cls=CLIPModel, what="a CLIP model")
    config: Any = model.config
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers has a complaint of its own for every damage
        raise BadWeights(f"{folder} cannot be read as a CLIP model: {first_line(error)}.") from None
    noised = getattr(config, "noised", None) or {}
    size = (int(config.vision_config.image_size),) * 2
    preprocessing = Preprocessing(size, (0.0,), (1.0,)) if noised else Preprocessing.of(folder, config)
    weights = hash_files([("clip", path) for path in find_weights(folder)])
    return Clip(folder.name, model, tokenizer, preprocessing, weights, codec=str(noised.get("codec", "")))


def clip_for(model: Model, name: str | None, method: str, noised: bool = True) -> Clip:
    """The CLIP that is to guide ``model``: the one named, else a built-in one where its space fits.

    ``noised``: whether ``method`` can use a noise-aware one. Raises NotSupported where none fits.
    """
    if name is None:
        own = _built_in(model, noised)
        if own is None:
            raise NotSupported(
                f"{method} needs a CLIP that knows what {model.name} draws, and the built-in ones know toys only: "
                f"name the folder of one (clip=FOLDER)."
            )
        name = own
    clip = load_clip(name, device=model.device)
    if clip.reads_noise and not noised:
        raise NotSupported(f"clip={name} of {method} reads noised latents; {method} looks at pictures: clip={PLAIN}.")
    if not clip.fits(model):
        raise NotSupported(
            f"clip={name} of {method} reads noised latents of another autoencoder than that of {model.name}; "
            f"name a CLIP of pictures (clip={PLAIN} or a folder)."
        )
    return clip


def _built_in(model: Model, noised: bool) -> str | None:
    """The built-in CLIP for a model that draws toys, that is, whose autoencoder is a built-in one."""
    own = codec_hash(model.pipe.vae)
    if noised and registry.find(NOISED) is not None and load_clip(NOISED, device=model.device).codec == own:
        return NOISED
    return PLAIN if own in _toy_codecs() else None


@once(1)
def _toy_codecs() -> list[str]:
    """Hashes of the built-in autoencoders of pictures."""
    from diffusers import AutoencoderKL

    known = [name for name in registry.names() if registry.card(name).get("objective") == "vae"]
    with quiet():
        return [codec_hash(AutoencoderKL.from_pretrained(registry.find(name), use_safetensors=True)) for name in known]
