"""Named nets that turn pictures into features. A figure always carries its net's name; none of ours is called "FID".

==================  ====================================================================================================
name                features
==================  ====================================================================================================
toy-clip, a folder  ``CLIPModel``: the projected image embedding, not normalised (b, d)
inception           torch-fidelity's port of the TensorFlow Inception v3, pool features (b, 2048): the standard FID's
==================  ====================================================================================================

Pictures of any size are brought to the net's own in one way, unlike in every other tool: the middle square is cut out,
then resized with Pillow's antialiased bicubic filter (Parmar et al. 2022, https://arxiv.org/abs/2104.11222, on why the
filter matters). Inception gets pictures as they are and resizes them itself, which is what makes its figure the FID.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import BadInput, BadWeights, NotSupported, UnknownName

DEFAULT_NET = "toy-clip"
INCEPTION = "inception"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FeatureNet(Protocol):
    """What the distances need of a net."""

    name: str
    hash: str
    rule: str  # how pictures are resized, in words
    distance: str  # what the Frechet distance on these features is called

    def features(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Pictures (RGB) as features (b, d) in float32."""
        ...


def square(picture: Image.Image, side: int) -> Image.Image:
    """The middle square of a picture in RGB at ``side`` x ``side`` pixels; unchanged when it is that already."""
    picture = picture.convert("RGB")
    if picture.size == (side, side):
        return picture
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    # cropped first: with resize(box=...) the filter would see beyond the square
    return picture.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.BICUBIC)


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as floats (b, 3, h, w) in [-1, 1]."""
    array = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


class ClipNet:
    """Any ``transformers.CLIPModel`` folder: picture and text embeddings, projected but not normalised."""

    def __init__(self, folder: Path, name: str, dtype: str = "float32", device: str = "cpu"):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        from sfumato.models import quiet
        from sfumato.models.weights import find_weights, first_line, hash_files

        self.name, self.device = name, device
        self.hash = hash_files([("clip", path) for path in find_weights(folder)[0]])  # pickles are refused here
        self.dtype = _dtype(dtype)
        try:
            with quiet():
                self.model: Any = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=self.dtype)
                self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
                processor = AutoImageProcessor.from_pretrained(folder)
        except Exception as error:  # transformers has a complaint of its own for every damage
            raise BadWeights(f"{folder} cannot be read as a CLIP model: {first_line(error)}") from None
        self.model.eval().requires_grad_(False).to(device)
        self.side = int(self.model.config.vision_config.image_size)
        self.mean, self.std = (
            torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std)
        )
        self.rule = f"middle square, bicubic to {self.side}x{self.side}"
        self.distance = f"FD({name})"

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Image embeddings (b, d)."""
        pixels = (as_tensor([square(picture, self.side) for picture in pictures]) / 2 + 0.5 - self.mean) / self.std
        seen = self.model.vision_model(pixel_values=pixels.to(self.device, self.dtype)).pooler_output
        return self.model.visual_projection(seen).float().cpu().numpy()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Text embeddings (b, d); what the text tower cannot read to the end is told by a warning."""
        longest = self.model.config.text_config.max_position_embeddings
        whole = self.tokenizer(list(texts))["input_ids"]
        cut = sum(len(tokens) > longest for tokens in whole)
        if cut:
            from sfumato.models import TruncatedPrompt

            told = f"{self.name} reads {longest} tokens: {cut} of {len(texts)} texts are longer and are cut off"
            warnings.warn(TruncatedPrompt(f"{told}."), stacklevel=2)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt").to(
            self.device
        )
        seen = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return self.model.text_projection(seen).float().cpu().numpy()


class InceptionNet:
    """Inception v3 of torch-fidelity, when the package is installed and its weights are on this machine already."""

    def __init__(self, dtype: str = "float32", device: str = "cpu"):
        self.name, self.rule, self.distance, self.device = (
            INCEPTION,
            "bilinear to 299x299, as TensorFlow 1",
            "FID",
            device,
        )
        if _dtype(dtype) is not torch.float32:
            raise BadInput(f"dtype={dtype!r}; the standard FID is defined in float32.")
        if importlib.util.find_spec("torch_fidelity") is None:
            raise NotSupported("net 'inception' needs the package torch-fidelity: pip install 'sfumato[judge]'.")
        weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        if not weights.is_file():
            raise NotSupported(
                f"net 'inception' needs its weights at {weights}, and nothing is downloaded here; run torch-fidelity"
                " once where there is a network, or use the default net."
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.hash = weights.stem.rpartition("-")[2]
        self.net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights)).to(device)

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Pool features (b, 2048); pictures of different sizes run one size after the other."""
        out: list[Any] = [None] * len(pictures)
        sizes = [picture.size for picture in pictures]
        for size in dict.fromkeys(sizes):
            rows = [row for row, each in enumerate(sizes) if each == size]
            pixels = np.stack([np.asarray(pictures[row].convert("RGB")) for row in rows])
            seen = self.net(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device))[0].float().cpu().numpy()
            for row, feature in zip(rows, seen, strict=True):
                out[row] = feature
        return np.stack(out)


@functools.lru_cache(maxsize=4)
def feature_net(name: str = DEFAULT_NET, dtype: str = "float32", device: str = "cpu") -> FeatureNet:
    """A net by name: ``toy-clip`` or another built-in CLIP, a ``CLIPModel`` folder, or ``inception``.

    Raises:
        UnknownName: nothing of this name. BadWeights: the folder is no CLIP. NotSupported: ``inception`` is not here.
    """
    return InceptionNet(dtype, device) if name == INCEPTION else clip_net(name, dtype, device)


@functools.lru_cache(maxsize=4)
def clip_net(name: str = DEFAULT_NET, dtype: str = "float32", device: str = "cpu") -> ClipNet:
    """A CLIP model by built-in name or folder. Raises as :func:`feature_net`."""
    folder = net_folder(name, "feature net", "clip", [INCEPTION])
    return ClipNet(folder, folder.name, dtype, device)


def net_folder(name: str, kind: str, built_in: str, more: Sequence[str] = ()) -> Path:
    """The folder of a built-in net whose name holds ``built_in``, or ``name`` itself when it is a folder."""
    from sfumato import registry

    found = registry.find(name) or Path(name)
    if not found.is_dir():
        raise UnknownName(kind, name, [*(each for each in registry.names() if built_in in each), *more])
    return found


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UnknownName("dtype", str(name), DTYPES)
    return DTYPES[name]
