"""A CLIP that guides: texts, pictures and noised latents as unit vectors of one space, all with gradients."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato import registry
from sfumato.clip.noised import codec_mark, noise_level, noised_input
from sfumato.errors import BadInput, BadWeights, NotSupported, UnknownName
from sfumato.models import Model, TruncatedPrompt, quiet
from sfumato.models.weights import find_weights, first_line, read_header

PLAIN, NOISED = "toy-clip", "toy-clip-noisy"
"""The built-in CLIPs: for pictures, and for the noised latents of toy-vae."""


@dataclass(frozen=True, eq=False)
class Clip:
    """A frozen ``transformers.CLIPModel``. ``codec`` names the autoencoder whose noised latents it reads
    (:func:`sfumato.clip.noised.codec_mark`), or is empty: then it reads pictures."""

    name: str
    model: Any
    tokenizer: Any
    mean: Tensor
    std: Tensor
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
    def device(self) -> torch.device:
        return self.model.device

    @property
    def scale(self) -> float:
        """What cosines are multiplied by to be logits, as learned."""
        return float(self.model.logit_scale.exp().clamp(max=100))

    def text(self, texts: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
        """Unit vectors (m d) of texts. Several ``templates``, such as "a painting of {}", are averaged (Radford et al.
        2021, section 3.1.4). Warns TruncatedPrompt where a text is longer than the CLIP reads."""
        for template in templates:
            if "{}" not in template:
                raise BadInput(f"the template {template!r} of a CLIP text lacks {{}}, which stands for the text.")
        length = self.model.config.text_config.max_position_embeddings
        rows = []
        for template in templates:
            told = [template.replace("{}", text) for text in texts]
            tokens = self.tokenizer(told, padding="longest", return_tensors="pt").input_ids
            if tokens.shape[1] > length:
                warnings.warn(f"{self.name} reads {length} tokens of a text; the rest is unseen.", TruncatedPrompt, 2)
                options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
                tokens = self.tokenizer(told, **options).input_ids
            with torch.no_grad():
                pooled = self.model.text_model(input_ids=tokens.to(self.device)).pooler_output
                rows.append(F.normalize(self.model.text_projection(pooled), dim=-1))
        return F.normalize(torch.stack(rows).mean(0), dim=-1)

    def pictures(self, pixels: Tensor) -> Tensor:
        """Unit vectors (b d) of pictures (b 3 H W) in [-1, 1], stretched to the square that the CLIP reads."""
        if self.reads_noise:
            raise NotSupported(f"{self.name} reads noised latents, not pictures; use a CLIP of pictures ({PLAIN}).")
        pixels = pixels.to(self.device, torch.float32)
        if pixels.shape[-2:] != (self.side, self.side):
            pixels = F.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True)
        return self._seen((pixels / 2 + 0.5 - self.mean) / self.std)

    def latents(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """Unit vectors (b d) of noised latents ``x = alpha x0 + sigma eps`` (b c h w)."""
        if not self.reads_noise:
            raise NotSupported(f"{self.name} reads pictures, not noised latents; use a noise-aware CLIP ({NOISED}).")
        x = x.to(self.device, torch.float32) / (alpha**2 + sigma**2) ** 0.5
        level = noise_level(alpha, sigma).to(x.device).expand(len(x))
        return self._seen(noised_input(x, level), interpolate=x.shape[-2:] != (self.side, self.side))

    def fits(self, model: Model) -> bool:
        """Whether it reads pictures, or noised latents of this model's autoencoder."""
        return not self.reads_noise or codec_mark(model.pipe.vae) == self.codec

    def _seen(self, given: Tensor, interpolate: bool = False) -> Tensor:
        out = self.model.vision_model(pixel_values=given, interpolate_pos_encoding=interpolate).pooler_output
        return F.normalize(self.model.visual_projection(out), dim=-1)


def load_clip(name: str | Path, device: torch.device | str = "cpu") -> Clip:
    """A CLIP by the name of a built-in one or the folder of a ``transformers.CLIPModel``, frozen, in float32.

    Raises:
        UnknownName: neither. BadWeights: the folder holds no CLIP, a pickle, or a damaged file.
    """
    folder = registry.find(str(name)) or Path(name)
    if not folder.is_dir():
        built_in = [
            known for known in registry.names() if registry.card(known).get("objective") in ("clip", "noisy_clip")
        ]
        raise UnknownName("CLIP (a built-in one or a folder)", str(name), built_in)
    return _loaded(str(name), folder, str(device))


@functools.lru_cache(maxsize=4)
def _loaded(name: str, folder: Path, device: str) -> Clip:
    from transformers import AutoTokenizer, CLIPModel

    for path in find_weights(folder)[0]:  # refuses pickles and damaged files
        read_header(path)
    try:
        with quiet():
            model = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        noised = getattr(model.config, "noised", None) or {}
        mean, std = (0.0, 1.0) if noised else _standardisation(folder)
    except Exception as error:  # transformers has a complaint of its own for every damage
        raise BadWeights(f"{folder} cannot be read as a CLIP model: {first_line(error)}.") from None
    model.eval().requires_grad_(False).to(device)  # type: ignore[arg-type]
    mean, std = (torch.tensor(value, device=device).reshape(-1, 1, 1) for value in (mean, std))
    return Clip(name, model, tokenizer, mean, std, codec=str(noised.get("codec", "")))


def _standardisation(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor

    with quiet():
        processor = AutoImageProcessor.from_pretrained(folder)
    return processor.image_mean, processor.image_std


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
    clip = load_clip(name, model.device)
    if clip.reads_noise and not noised:
        raise NotSupported(f"clip={name} of {method} reads noised latents; {method} looks at pictures: clip={PLAIN}.")
    if not clip.fits(model):
        raise NotSupported(
            f"clip={name} of {method} reads noised latents of another autoencoder than that of {model.name}; "
            f"name a CLIP of pictures (clip={PLAIN} or a folder)."
        )
    return clip


def _built_in(model: Model, noised: bool) -> str | None:
    """The built-in CLIP for a model that draws toys: one whose text encoder or autoencoder is the toybox's own."""
    if registry.find(NOISED) is not None and load_clip(NOISED, model.device).fits(model):
        return NOISED if noised else PLAIN
    return None
