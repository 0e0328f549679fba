"""Named nets that turn pictures into features. A figure always carries its net's name; none of ours is called "FID".

==================  ====================================================================================================
name                features
==================  ====================================================================================================
toy-clip, a folder  ``CLIPModel``: the projected image embedding, not normalised (b, d)
inception           torch-fidelity's port of the TensorFlow Inception v3, pool features (b, 2048): the standard FID's
==================  ====================================================================================================

Pictures of any size are brought to the net's own in one way, unlike in every other tool: a square centre crop is
resized with Pillow's antialiased bicubic filter (Parmar et al. 2022, https://arxiv.org/abs/2104.11222, on why the
filter matters). Inception gets pictures as they are and resizes them itself, which is what makes its figure the FID.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from sfumato import registry
from sfumato.arrays import to_tensor
from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.models.readers.clip import DTYPES, PLAIN, load_clip
from sfumato.models.readers.loading import net_folder
from sfumato.once import once

INCEPTION = "inception"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


class FeatureNet(Protocol):
    """What the distances need of a net."""

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str:
        """SHA-256 of the weights."""
        ...

    @property
    def rule(self) -> str:
        """How pictures are resized, in words."""
        ...

    @property
    def distance(self) -> str:
        """What the Frechet distance on these features is called."""
        ...

    def features(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Pictures (RGB) as features (b, d) in float32."""
        ...


class InceptionNet:
    """Inception v3 of torch-fidelity, when the package is installed and its weights are on this machine already."""

    def __init__(self, dtype: str = "float32", device: str = "cpu"):
        self.name, self.rule, self.distance, self.device = (
            INCEPTION,
            "bilinear to 299x299, as TensorFlow 1",
            "FID",
            device,
        )
        if dtype not in DTYPES:
            raise UnknownName("dtype", str(dtype), DTYPES)
        if dtype != "float32":
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
            found = self.net(to_tensor(pixels).permute(0, 3, 1, 2).to(self.device))[0].float().cpu().numpy()
            for row, feature in zip(rows, found, strict=True):
                out[row] = feature
        return np.stack(out)


@once(4)
def feature_net(name: str = PLAIN, dtype: str = "float32", device: str = "cpu") -> FeatureNet:
    """A net by name: ``toy-clip``, a ``CLIPModel`` folder, or ``inception``.

    Raises:
        UnknownName: nothing of this name. BadWeights: the folder is no CLIP. NotSupported: ``inception`` is not here.
    """
    if name == INCEPTION:
        return InceptionNet(dtype, device)
    net_folder(name, "feature net", [each for each in registry.names() if "clip" in each], [INCEPTION])
    return load_clip(name, dtype, device)
