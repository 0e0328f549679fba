"""`HeatMaps`: where the words of one prompt acted in one picture or clip, as recorded, with every reduction done on
demand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato import files, sheets
from sfumato.arrays import to_tensor
from sfumato.attention.accumulate import LayerMaps, upscale
from sfumato.attention.sites import Site, matches_place
from sfumato.errors import BadInput, NoMatch, UnknownName
from sfumato.explain import heat_overlays
from sfumato.metrics.segmentation import normalise
from sfumato.text.words import Reading, WordSpan

__all__ = ["HeatMaps"]

NORMALIZATIONS = ("raw", "minmax", "max", "tokens")
FORMAT = "sfumato.heatmaps.1"


@dataclass(frozen=True, eq=False)
class HeatMaps:
    """Attention of the image to each text token, per layer, and the word maps made of it.

    ``layers`` hold mean maps at their own resolution for the text-axis ``positions``; nothing is ever overwritten.
    ``reading`` is the prompt as the text encoders read it, so any word or phrase of it can be mapped, also after
    :meth:`load`. ``size`` is the picture's (H, W). ``words`` are the labels that were named, in order.
    ``reference``: sums over steps, clamps each head after interpolation and averages heads of all layers alike, as the
    original implementation does; else steps are averaged and every layer counts the same. Maps of a clip have an axis
    of ``frames`` in front of (h w), and are scaled over all frames together.
    ``facts``: model, seed, number of steps and whatever else is worth knowing, as plain JSON values.
    """

    reading: Reading
    layers: tuple[LayerMaps, ...]
    positions: tuple[int, ...]
    size: tuple[int, int]
    words: tuple[str, ...]
    reference: bool = False
    normalization: str = "raw"
    facts: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        h, w = self.size
        return f"HeatMaps({self.prompt!r}, {len(self.words)} words, {len(self.layers)} layers, {w}x{h})"

    # -- maps ----------------------------------------------------------------------------------------------------------

    @property
    def prompt(self) -> str:
        return self.reading.prompt

    @property
    def frames(self) -> int:
        """How many frames the clip has; 1 for a picture."""
        return self.layers[0].site.frames if self.layers else 1

    @property
    def resolution(self) -> tuple[int, int]:
        """(h, w) of the finest layer: the common resolution at which layers are averaged."""
        grids = [layer.maps.shape[-2:] for layer in self.layers]
        return max(g[0] for g in grids), max(g[1] for g in grids)

    def tokens(
        self,
        layers: Sequence[str] | None = None,
        heads: Sequence[int] | None = None,
        steps: Sequence[int] | None = None,
    ) -> Tensor:
        """(c [f] h w): one map per recorded position, at :attr:`resolution`; mean over layers of the upscaled maps.

        ``layers``: shell patterns on block ("up", "joint.3") or module path. ``heads`` and ``steps``: numbers, which
        must have been kept while recording. Raises NoMatch when nothing is left.
        """
        if layers is None and heads is None and steps is None:
            return self._tokens
        chosen = [layer for layer in self.layers if layers is None or matches_place(layer.site, _strings(layers))]
        if not chosen:
            places = ", ".join(dict.fromkeys(layer.site.block for layer in self.layers))
            raise NoMatch(f"layers={list(_strings(layers or ()))} match none of the recorded ones: {places}.")
        return self._averaged(chosen, heads, steps)

    @cached_property
    def _tokens(self) -> Tensor:
        return self._averaged(self.layers)

    def _averaged(
        self, layers: Sequence[LayerMaps], heads: Sequence[int] | None = None, steps: Sequence[int] | None = None
    ) -> Tensor:
        frames = (self.frames,) if self.frames > 1 else ()
        total, weight = torch.zeros(len(self.positions), *frames, *self.resolution), 0
        for layer in layers:
            maps = layer.mean(steps, heads)
            if self.reference:
                calls = [n for i, n in enumerate(layer.calls) if steps is None or layer.steps[i] in steps]
                total += upscale(maps * sum(calls), self.resolution).sum(0)
                weight += len(maps)
            else:
                total += upscale(maps.mean(0), self.resolution)
                weight += 1
        return total / weight

    def map(
        self,
        word: str | WordSpan,
        *,
        size: tuple[int, int] | None = None,
        stream: str | None = None,
        merge: bool = False,
        layers: Sequence[str] | None = None,
        heads: Sequence[int] | None = None,
        steps: Sequence[int] | None = None,
    ) -> Tensor:
        """([f] H W) float32: where a word, phrase or special token acted; the mean over its sub-tokens.

        Args:
            word: any words of the prompt, "cube#2" for the second cube, "<start>", "<end>", or a span of ``reading``.
            size: (H, W), by default the picture's; :attr:`resolution` gives the map before its last interpolation.
            stream: only the tokens of this text encoder ("clip", "t5"). By default encoders that share positions count
                once, and those that follow each other in the sequence (SD3: CLIP, then T5) are summed.
            merge: average all occurrences of a repeated word (always so with ``reference``).
            layers, heads, steps: see :meth:`tokens`.

        Raises NoMatch for a word that is not in the prompt or was not recorded, BadInput for one that occurs several
        times without a distinction.
        """
        spans = [word] if isinstance(word, WordSpan) else self._resolve(word, merge or self.reference)
        tokens = self.tokens(layers, heads, steps)
        if self.normalization == "tokens":
            real = [self.positions.index(p) for group in self.reading.tokens().values() for p in group]
            tokens = tokens / (tokens[sorted(set(real))].sum(0, keepdim=True) + 1e-6)
        total = torch.zeros(tokens.shape[1:])
        parts = [self._positions(spans, streams) for streams in self._axes(stream)]
        for positions in parts:
            if positions:
                total = total + tokens[[self._index(p, spans[0]) for p in positions]].mean(0)
        if not any(parts):
            raise NoMatch(f"{spans[0].label!r} has no token in the text encoder {stream!r}.")
        total = upscale(total, self.size if size is None else size)
        return self._unit(total, self.normalization) if self.normalization in ("minmax", "max") else total

    def normalized(self, how: str) -> HeatMaps:
        """The same maps under another scale: "raw"; "minmax" or "max", each word's map to [0, 1] at its final size;
        "tokens", each token's share among all real tokens (start, end and padding left out)."""
        if how not in NORMALIZATIONS:
            raise UnknownName("normalization", str(how), NORMALIZATIONS)
        return replace(self, normalization=how)

    def mask(self, word: str | WordSpan, tau: float = 0.4, **options: Any) -> Tensor:
        """([f] H W) bool: where the word's map exceeds ``tau`` of its range. The range is [min, max] as in the original
        code, or [0, max] as in the paper after ``normalized("max")``."""
        if not 0 <= tau <= 1:
            raise BadInput(f"tau={tau!r} is not a share between 0 and 1.")
        found = self.map(word, **options)
        return self._unit(found, "max" if self.normalization == "max" else "minmax") > tau

    def iou(self, word: str | WordSpan, other: Any, tau: float = 0.4) -> float:
        """Intersection over union of the word's mask with another word's, or with a mask ([f] H W); 1 if both are
        empty."""
        a, b = self.mask(word, tau), self._other(other, tau)
        union = int((a | b).sum())
        return int((a & b).sum()) / union if union else 1.0

    # -- pictures ------------------------------------------------------------------------------------------------------

    def overlay(
        self, image: Image.Image, word: str | WordSpan, colours: str = heat_overlays.COLOURS, frame: int = 0
    ) -> Image.Image:
        """The picture, enlarged if it is small, with the word's map over it; of a clip, one ``frame`` of it."""
        return heat_overlays.overlay(image, self._shown(word)[frame], colours)

    def overlays(self, clip: np.ndarray, word: str | WordSpan, colours: str = heat_overlays.COLOURS) -> np.ndarray:
        """All frames (f h w 3) of a clip with the word's map over them, (f H W 3) uint8 like the clip: to be saved with
        :func:`sfumato.clips.save_clip`."""
        self._check_frames(clip)
        return heat_overlays.overlays(clip, self._shown(word), colours)

    def grid(
        self, image: Image.Image | np.ndarray, words: Sequence[str] | None = None, colours: str = heat_overlays.COLOURS
    ) -> Image.Image:
        """One labelled picture: the image, then an overlay for every word (by default :attr:`words`). Of a clip (f h w
        3) uint8: a strip of its frames, and one of overlays for every word."""
        labels = list(self.words if words is None else _strings(words))
        h, w = heat_overlays.enlarged_size(self.size)
        if not isinstance(image, Image.Image):
            self._check_frames(image)
            return heat_overlays.strips(image, {label: self._shown(label) for label in labels}, self.prompt, colours)
        cells = [("", image.convert("RGB").resize((w, h), Image.Resampling.BICUBIC))]
        cells += [(label, self.overlay(image, label, colours)) for label in labels]
        return sheets.sheet(cells, title=self.prompt)

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> Path:
        """Write all maps and facts to one ``.safetensors`` file, whole or not at all. Raises OSError."""
        described = {
            "reading": self.reading.to_json(),
            "layers": [
                {"site": asdict(layer.site), "heads": layer.heads, "calls": layer.calls, "steps": layer.steps}
                for layer in self.layers
            ],
            **{name: getattr(self, name) for name in ("positions", "size", "words", "reference", "normalization")},
            "facts": self.facts,
        }
        tensors = {str(i): layer.maps for i, layer in enumerate(self.layers)}
        return files.save_tensors(
            path, tensors, {"format": FORMAT, "heatmaps": json.dumps(described, ensure_ascii=False)}
        )

    @classmethod
    def load(cls, path: Path | str) -> HeatMaps:
        """What :meth:`save` wrote. Raises BadInput for any other file, OSError when it cannot be read."""
        with files.reading_tensors(path, FORMAT, "heat maps") as (file, metadata):
            described = json.loads(metadata["heatmaps"])
            layers = []
            for i, layer in enumerate(described["layers"]):
                facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in layer["site"].items()}
                maps, site = file.get_tensor(str(i)).float(), Site(**facts)
                calls, steps = tuple(layer["calls"]), tuple(layer["steps"])
                fits = maps.shape[3:] == site.shape and maps.shape[2] == len(described["positions"])
                if not fits or len(maps) != len(calls):
                    raise ValueError("shapes")
                layers.append(LayerMaps(site, maps, int(layer["heads"]), calls, steps))
            return cls(
                Reading.from_json(described["reading"]),
                tuple(layers),
                tuple(described["positions"]),
                tuple(described["size"]),
                tuple(described["words"]),
                bool(described["reference"]),
                described["normalization"],
                dict(described["facts"]),
            )

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _shown(self, word: str | WordSpan) -> Tensor:
        """The map (f H W) of a word in [0, 1] as it is drawn: large enough to see, a picture being one frame."""
        found = self._unit(self.map(word, size=heat_overlays.enlarged_size(self.size)))
        return found if found.dim() == 3 else found[None]

    def _check_frames(self, clip: np.ndarray) -> None:
        if len(clip) != self.frames:
            raise BadInput(f"the clip has {len(clip)} frames; the maps are of {self.frames}.")

    def _unit(self, found: Tensor, how: str = "minmax") -> Tensor:
        """A word's map ([f] h w) brought to [0, 1], all frames alike."""
        return normalise(found, how, 3 if self.frames > 1 else 2)

    def _resolve(self, word: str, merge: bool) -> list[WordSpan]:
        return self.reading.find(word) if merge else [self.reading.one(word)]

    def _axes(self, stream: str | None) -> list[list[str]]:
        """Text encoders by the part of the text axis they share: [["clip", "clip2"], ["t5"]]."""
        if stream is not None:
            if stream not in self.reading.streams:
                raise UnknownName("text encoder", stream, self.reading.streams)
            return [[stream]]
        axes: dict[int, list[str]] = {}
        for name, each in self.reading.streams.items():
            axes.setdefault(each.offset, []).append(name)
        return list(axes.values())

    @staticmethod
    def _positions(spans: Sequence[WordSpan], streams: Sequence[str]) -> list[int]:
        return sorted({p for span in spans for name in streams for p in span.tokens[name]})

    def _index(self, position: int, span: WordSpan) -> int:
        if position not in self.positions:
            raise NoMatch(f"{span.label!r} was not recorded; its maps need padding=True while recording.")
        return self.positions.index(position)

    def _other(self, other: Any, tau: float) -> Tensor:
        if isinstance(other, str | WordSpan):
            return self.mask(other, tau)
        mask = to_tensor(np.asarray(other)).bool()
        expected = (self.frames, *self.size) if self.frames > 1 else tuple(self.size)
        if tuple(mask.shape) != expected:
            raise BadInput(f"the mask has shape {tuple(mask.shape)}; the picture's is {expected}.")
        return mask


def _strings(given: str | Sequence[str]) -> Sequence[str]:
    return [given] if isinstance(given, str) else given
