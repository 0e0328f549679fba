"""Toybox pictures by the thousand: rendered once, cached on disk, the same for everybody from the same seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .. import registry, valid, writing
from ..errors import BadInput, UnknownName
from ..ondemand import Spec, Store
from ..rng import sequence
from . import captions, rendering
from .captions import Caption
from .scene import Scene, sample_scene

WORLD = 1  # raised when the same arguments draw another picture, so that no stale cache is read
DATA_SPLITS = ("train", "val", "test", "heldout")


def cache_root() -> Path:
    """Folder for renders and runs: ``$SFUMATO_CACHE``, else ``~/.cache/sfumato``."""
    return registry.cache_folder()


def draw_scene(split: str, seed: int, index: int, toys: int | None = None) -> Scene:
    """Scene ``index`` of a split: a pure function of its arguments, so that sets grow without changing.

    "train", "val" and "test" never hold a held-out attribute combination and differ in their seeds; every toy of
    "heldout" is a held-out combination.
    """
    if split not in DATA_SPLITS:
        raise UnknownName("split", split, DATA_SPLITS)
    generator = sequence("toybox.scene", seed, DATA_SPLITS.index(split), index)
    return sample_scene(generator, toys, "heldout" if split == "heldout" else "train")


class ToyboxDataset:
    """``n`` rendered scenes of a split.

    Attributes:
        images: (n, size, size, 3) uint8, memory-mapped.
        masks: (n, size, size) int8, memory-mapped; -1 background, else toy index.
        scenes: the n scenes.

    Rendered on first use into ``cache`` (default: the cache folder) and read from there afterwards; an interrupted
    rendering goes on where it was. ``lazy``: a scene is rendered when it is first read.

    Raises:
        UnknownName: split; BadInput: n < 1.
    """

    def __init__(
        self,
        split: str = "train",
        n: int = 1000,
        size: int = 64,
        seed: int = 0,
        toys: int | None = None,
        cache: Path | str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        lazy: bool = False,
    ):
        if split not in DATA_SPLITS:
            raise UnknownName("split", split, DATA_SPLITS)
        if n < 1:
            raise BadInput(f"n must be at least 1, got {n}.")
        self.split, self.n, self.size, self.seed = split, n, size, seed
        self.scenes = [draw_scene(split, seed, i, toys) for i in range(n)]
        crowd = "" if toys is None else f"-toys{toys}"
        self._attach(cache, f"world{WORLD}-{split}-{n}-{size}-seed{seed}{crowd}", on_progress, lazy)

    def _attach(
        self, cache: Path | str | None, name: str, on_progress: Callable[[int, int], None] | None, lazy: bool = False
    ) -> None:
        """Opens the pictures of ``scenes`` kept as ``name`` in ``cache`` (None: the user's), rendering them first where
        they are not there; ``lazy``: each when it is first read."""
        self.folder = folder = (Path(cache) if cache else cache_root() / "toybox") / name
        specs = {
            "images": Spec(folder / "images.npy", (self.size, self.size, 3), np.uint8),
            "masks": Spec(folder / "masks.npy", (self.size, self.size), np.int8),
        }
        store = Store(self.n, specs, folder.with_name(f"{folder.name}.unfinished"), self._render)
        if not lazy:
            store.fill(on_progress)
        self.images, self.masks = (store.rows(key) if store.missing.any() else store.arrays[key] for key in specs)

    def __len__(self) -> int:
        return self.n

    def caption(
        self, i: int, rng: np.random.Generator | None = None, style: str | None = None, colorless: float = 0.0
    ) -> Caption:
        """A caption of scene i; its style is "random" when ``rng`` is given, else "full", unless ``style`` is given.
        ``colorless``: see :func:`~sfumato.toybox.caption`."""
        return captions.caption(self.scenes[i], rng, style or ("random" if rng is not None else "full"), colorless)

    def _render(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        frames = rendering.render([self.scenes[i] for i in rows.tolist()], self.size)
        images = rendering.to_uint8(frames.image).permute(0, 2, 3, 1).numpy()
        return {"images": images, "masks": frames.mask.numpy()}


def bounded(n: int, size: int, seed: int) -> None:
    """Raises BadInput for more, larger or otherwise numbered scenes than are written."""
    valid.whole(n, "n", 1, 1_000_000)
    valid.whole(size, "size", 16, 1024)
    valid.whole(seed, "seed", 0, 2**62 - 1)


def export_imagefolder(
    folder: Path | str,
    n: int = 16,
    size: int = 64,
    seed: int = 0,
    split: str = "train",
    style: str = "random",
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes an imagefolder that any trainer reads: ``metadata.jsonl`` (file_name, text), PNGs, masks and scenes.

    Masks are 8-bit PNGs under ``masks/`` (0 background, i + 1 for toy i), scenes JSON under ``scenes/``; both are
    named in the metadata too, with boxes and the caption's phrases. Written beside and renamed: an interrupted export
    leaves nothing.

    Raises:
        BadInput: the folder exists and is not empty. OSError: it cannot be written.
    """
    from PIL import Image

    folder = writing.only_folder(folder, "pictures, masks and scenes")
    bounded(n, size, seed)
    if style not in captions.STYLES:
        raise UnknownName("caption style", style, captions.STYLES)
    with writing.atomic_folder(folder) as part:
        for name in ("masks", "scenes"):
            (part / name).mkdir(parents=True)
        with (part / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
            for start in range(0, n, 64):
                scenes = [draw_scene(split, seed, i) for i in range(start, min(start + 64, n))]
                frames = rendering.render(scenes, size)
                for j, scene in enumerate(scenes):
                    i = start + j
                    # The caption's draw is apart from the scene's, so that styles do not change pictures.
                    generator = sequence("toybox.caption", seed, DATA_SPLITS.index(split), i)
                    caption = captions.caption(scene, generator, style)
                    name = f"{i:06d}"
                    frames.pil(j).save(part / f"{name}.png")
                    Image.fromarray((frames.mask[j] + 1).numpy().astype(np.uint8)).save(part / "masks" / f"{name}.png")
                    (part / "scenes" / f"{name}.json").write_text(scene.to_json(), encoding="utf-8")
                    row = {
                        "file_name": f"{name}.png",
                        "text": caption.text,
                        "mask": f"masks/{name}.png",
                        "scene": f"scenes/{name}.json",
                        "boxes": [None if b[0] != b[0] else b for b in frames.boxes[j].tolist()],
                        "phrases": [
                            {"text": p.text, "start": p.start, "end": p.end, "object": p.object}
                            for p in caption.phrases
                        ],
                    }
                    metadata.write(json.dumps(row) + "\n")
                if on_progress:
                    on_progress(min(start + 64, n), n)
    return folder
