"""From a name to masks: a segmenter taught by a generator, and masks of pictures by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import cards, files, protocol, valid, writing
from sfumato.app.arguments import SegmentArguments
from sfumato.app.jobs import DEFAULT_MODEL, PICTURES, load, suitable_model
from sfumato.app.pictures import fitting_size
from sfumato.cards.signatures import with_signature
from sfumato.errors import BadInput, NotSupported

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from typing_extensions import Unpack

    from sfumato.models import Model


@with_signature(SegmentArguments, cards.parameters(cards.default("segment")))
def segment(
    concept: str,
    pictures: Any = None,
    *,
    model: str | Path | Model = DEFAULT_MODEL,
    remover: str | Path | Model | None = None,
    by: str | None = None,
    size: tuple[int, int] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    **options: Unpack[SegmentArguments],
) -> protocol.Segmentation:
    """From the name of an object to a network that segments it, with no mask drawn.

    Args:
        concept: the object's name, such as ``"ball"``.
        pictures: a folder, files or PIL pictures that show it; None makes ``n`` of them.
        model: knows the object and says roughly where it is.
        remover: redraws pictures without it: for the default model a built-in inpainting model that draws at its size,
            if there is one, else ``model`` itself.
        by: the system that does it, as for ``--with``; by default the one whose card says so.
        size: (width, height) to which pictures are cut; by default about the model's own area.
        on_progress: called with (stage, done, of how many).
        options: parameters of the system (``prompt``, ``background``, ``n``, ``iterations`` ...).

    Returns:
        What the system found: masks of every stage, ``segmenter``, ``save(folder)``.
    """
    valid.text(concept, "concept")
    system = _built(by, {**options})
    shown = None if pictures is None else [image for _, image in _listed(pictures)]
    loaded = load(model) if isinstance(model, str | Path) else model
    if remover is None:
        remover = _default_remover(loaded) if model == DEFAULT_MODEL else loaded
    other = load(remover) if isinstance(remover, str | Path) else remover
    if shown is not None:
        size = size or fitting_size(loaded, shown[0].size)
        shown = [files.fitted(image.convert("RGB"), size) for image in shown]
    return system.segment(loaded, concept, shown, remover=other, on_progress=on_progress)


def segment_files(
    what: str,
    pictures: Sequence[Path],
    out: Path,
    model: str | None = None,
    remover: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    on_progress: Callable[[str, int, int], None] | None = None,
    by: str | None = None,
    config: str | None = None,
    **options: Any,
) -> list[Path]:
    """:func:`segment` with everything written into the new folder ``out``; or, where ``what`` is a segmenter's file,
    the masks of ``pictures`` by it. Returns the files: masks, and the segmenter.

    Raises:
        BadInput: ``out`` is not empty, or no pictures. Everything that :func:`segment` raises, and OSError.
    """
    if out.is_dir() and any(out.iterdir()):
        raise BadInput(f"output folder {str(out)!r} is not empty; name a new one with -o.")
    listed = _listed(list(pictures)) if pictures else []
    names = [name for name, _ in listed]
    if Path(what).suffix == ".safetensors":
        if not listed:
            raise BadInput(f"{what} is a segmenter; name the pictures to segment.")
        if options or model or remover:
            raise BadInput(f"{what} is trained already: only pictures and -o go with it.")
        if not Path(what).is_file():
            raise BadInput(f"there is no file {what}; name an object, or a segmenter made before.")
        with writing.output(out) as (folder, named):
            segmenter = _built(by, {}).open_segmenter(Path(what))
            about, n = {"segmenter": Path(what).name}, len(listed)
            places = [writing.numbered(named, i, n) or folder / f"{name}.png" for i, (name, _) in enumerate(listed)]
            return [
                files.save_png(at, segmenter.mask(image), about) for at, (_, image) in zip(places, listed, strict=True)
            ]
    writing.only_folder(out, "masks and a segmenter")
    valid.text(what, "what")
    _built(by, {k: v for k, v in options.items() if k != "size"})
    with writing.output_folder(out), writing.reserved(out, "segmenting"):
        loaded: dict[str, Any] = {"model": load(model or DEFAULT_MODEL, dtype=dtype, device=device, config=config)}
        if remover is not None:
            loaded["remover"] = load(remover, dtype=dtype, device=device)
        elif model is None:
            loaded["remover"] = _default_remover(loaded["model"], dtype=dtype, device=device)
        images = [image for _, image in listed] or None
        found = segment(what, images, by=by, on_progress=on_progress, **loaded, **options)
        return found.save(out, names or None)


def _default_remover(model: Model, **how: Any) -> Model:
    """The built-in inpainting model, where it draws at the size of the built-in ``model``; else ``model`` itself."""
    other = load(suitable_model(cards.methods()[cards.default("edit mask")].needs), **how)
    return other if other.default_size == model.default_size else model


def _built(by: str | None, options: dict[str, Any]) -> protocol.Segments:
    """The system that segments. Raises NotSupported for one that does not."""
    key, params = cards.parse_with(by or cards.default("segment"))
    system = cards.method(key)(**{**params, **options})
    if not isinstance(system, protocol.Segments):
        raise NotSupported(f"{key} does not learn to segment; by default {cards.default('segment')} does.")
    return system


def _listed(given: Any) -> list[tuple[str, Image]]:
    """(name, picture) of pictures given as a folder, files or PIL pictures; names are distinct.

    Raises BadInput where there is none.
    """
    found: list[tuple[str, Image]] = []
    for each in given if isinstance(given, list | tuple) else [given]:
        if not isinstance(each, str | Path):
            found.append((f"{len(found):05d}", each))
            continue
        path = Path(each)
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES) if path.is_dir() else [path]
        found += [(p.stem, files.read_picture(p)) for p in inside]
    if not found:
        raise BadInput(f"there is no picture in {given}; PNG, JPEG, WebP, BMP, GIF and TIFF are read.")
    count: dict[str, int] = {}
    named = []
    for name, image in found:
        count[name] = count.get(name, 0) + 1
        named.append((name if count[name] == 1 else f"{name}-{count[name]}", image))
    return named
