"""CLIPScore: how well a picture fits its caption in the eyes of a CLIP model, 100 max(cos, 0).

Hessel et al. 2021 (https://arxiv.org/abs/2104.08718), equation 1, with the weight 100 that the field prints instead of
the paper's 2.5. The figure carries the CLIP's name: scores of different CLIPs do not compare.
"""

from __future__ import annotations

import numpy as np

from sfumato.errors import BadInput


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (b, d) in float64, of length 1; a row of zeros stays zero."""
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 max(cos, 0) of image and text embeddings (b, d), row by row: (b,)."""
    images, texts = np.asarray(images), np.asarray(texts)
    if images.shape != texts.shape or images.ndim != 2:
        raise BadInput(f"clip_scores: images {images.shape} and texts {texts.shape} must both be (pictures, numbers).")
    return 100 * np.maximum((unit(images) * unit(texts)).sum(-1), 0)
