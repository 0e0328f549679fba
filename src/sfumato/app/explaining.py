"""Explanations of pictures: where words acted, what an answer rests on, what a net or a model is made of."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import cards, files
from sfumato.app.jobs import DEFAULT_MODEL, Order, build_all, fitting_size, is_picture, load, make, picture_and_prompt
from sfumato.errors import BadInput, NotSupported

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.models import Model
    from sfumato.sampling import Result


@dataclass(frozen=True, eq=False)
class Explanation:
    """What :func:`explain` found: per picture, the picture and what the system says about it (heat maps, for DAAM).

    ``result`` is the generation it was found in, None for pictures that existed already and for what is not about one
    picture (conceptor: ``maps`` holds the decomposition, ``images`` pictures of the concept).
    """

    images: list[Image]
    maps: list[Any]
    result: Result | None = None


def explain(
    what: str | Path | Image,
    prompt: str | None = None,
    *,
    words: str | Sequence[str] = (),
    model: str | Path | Model = DEFAULT_MODEL,
    by: str = "daam",
    **options: Any,
) -> Any:
    """Where words of a prompt are in a picture; what in a picture led a reading model to its answer; or, with a system
    that explains nets, what the layers of one know.

    With such a system (``by="shape_texture"``) ``what`` is a net - a built-in name, a folder, a module, a
    :class:`Model` - and its own table comes back; otherwise an :class:`Explanation`.

    Args:
        what: a prompt, to make pictures from and explain these; or a picture that exists (PIL, or a path together with
            ``prompt``; a picture that carries a recipe brings its own prompt). For ``conceptor`` a concept in words, a
            picture, or a folder of pictures.
        prompt: what the existing picture shows; what a model that reads (``toy-clip``, ``toy-vqa``, any transformers
            folder) is asked about it: a text, a question, a class. A classifier and a detector need none.
        words: words or phrases to look for; none: every word of the prompt.
        by: the system, as for ``--with`` (``"daam:heads=[0|1]"``).
        options: when making pictures those of :func:`make`; for an existing picture ``steps`` (noise levels to look
            at), ``seed``, ``scheduler`` and ``size`` (width, height; by default about the model's own area).

    Raises:
        NoMatch: a word is not in the prompt. BadInput, UnknownName, NotSupported: as :func:`make` and :func:`load`.
    """
    key, params = cards.parse_with(by)
    if words:
        params["words"] = [words] if isinstance(words, str) else list(words)
    system = cards.method(key)(**params)
    if hasattr(system, "explain_model"):
        return system.explain_model(open_net(what), **options)
    if hasattr(system, "examine"):  # it looks at the model rather than at one picture
        finding = system.examine(load(model) if isinstance(model, str | Path) else model, what, prompt, **options)
        return Explanation(finding.pictures, [finding])
    if getattr(system, "reads", False) and (isinstance(model, str | Path) or not hasattr(model, "denoiser")):
        found = _explain_reading(what, prompt, model, system, options)
        if found is not None:
            return found
    if isinstance(what, str) and prompt is None and not is_picture(what):
        if not hasattr(system, "taps"):
            raise NotSupported(f"{key} explains pictures that exist; give one, and the prompt beside it.")
        result = make(what, model=model, with_=[system], **options)
        return Explanation(result.images, system.maps, result)
    image, prompt = picture_and_prompt(what, prompt)
    # the function beside the class, because there is no generation that the object could take part in
    look = getattr(importlib.import_module(type(system).__module__), "explain_image", None)
    if look is None:
        raise NotSupported(f"{key} explains pictures while they are made only; give a prompt instead of a picture.")
    loaded = load(model) if isinstance(model, str | Path) else model
    size = options.pop("size", None) or fitting_size(loaded, image.size)
    return Explanation([image], [look(loaded, image, prompt, size=size, **system.params.model_dump(), **options)])


def _explain_reading(
    what: str | Path | Image, prompt: str | None, model: Any, system: Any, options: dict[str, Any]
) -> Explanation | None:
    """What a model that reads says about a picture or a text; None if the model draws."""
    from sfumato.models.readers import is_reader, load_reader

    if isinstance(model, str | Path):
        if not is_reader(model):
            return None
        model = load_reader(model)
    look = importlib.import_module(type(system).__module__).explain_image
    if options.pop("size", None) is not None:
        raise BadInput(f"size is for models that draw; {model.name} looks at pictures in a size of its own.")
    given = system.params.model_dump()
    if isinstance(what, str) and prompt is None and not is_picture(what):
        if model.kind != "texts":
            raise BadInput(f"{model.name} looks at pictures; give one, and what to ask as the prompt.")
        return Explanation([], [look(model, None, what, **given, **options)])
    image = files.read_picture(what) if isinstance(what, str | Path) else what
    return Explanation([image], [look(model, image, prompt, **given, **options)])


def is_read(by: str, order: Order) -> bool:
    """Whether ``by`` explains, with this order's model, something read rather than something drawn."""
    from sfumato.models.readers import is_reader

    return getattr(cards.method(cards.parse_with(by)[0]), "reads", False) and is_reader(order.model or DEFAULT_MODEL)


def explain_file(
    picture: Path,
    prompt: str | None,
    by: str,
    words: Sequence[str],
    order: Order,
    out: Path,
    options: dict[str, Any],
    text: bool = False,
) -> list[Path]:
    """Explain a picture that exists and write the heat maps into folder ``out``; returns the files.

    ``text``: what is given as ``picture`` is a text, for a model that reads texts.

    Raises:
        Everything that :func:`explain` raises, and OSError.
    """
    key, params = cards.parse_with(by)
    system = cards.method(key)(**params)
    name = order.model or DEFAULT_MODEL
    reader = _reader(name, order) if getattr(system, "reads", False) else None
    image: Any = None
    if reader is None:
        image, prompt = picture_and_prompt(picture, prompt)
    elif not text:
        image = files.read_picture(picture)
    with files.output_folder(out):
        model = reader or load(name, dtype=order.dtype, device=order.device)
        what, asked = (str(picture), None) if text else (image, prompt)
        [maps] = explain(what, asked, words=words, by=by, model=model, **options).maps
        path = files.free_name(out, f"{files.slug(str(picture) if text else picture.stem)}.heat")
        recipe = {"prompt": prompt, "picture": picture.name, "model": model.name, "hash": model.weight_hash, "by": by}
        written = [files.save_png(path, maps.grid(image), recipe)]
        if order.maps:
            written.append(maps.save(path.with_suffix(".safetensors")))
        return written


def open_net(what: Any, dtype: str | None = None, device: str = "cpu") -> Any:
    """A net to look into: a text-to-image model, or a module that is called with pictures; both pass through.

    Raises:
        UnknownName, BadWeights, NotSupported: nothing of this name, or nothing that looks at pictures.
    """
    from sfumato.models.vision import is_vision, load_vision

    if not isinstance(what, str | Path):
        return what
    return load_vision(what) if is_vision(what) else load(what, dtype=dtype, device=device)


def explain_net(what: str, by: str, order: Order, out: Path) -> tuple[list[str], list[Path]]:
    """What the layers of a net know, in lines, and written as table and plot into folder ``out``."""
    key, params = cards.parse_with(by)
    system: Any = cards.method(key)(**params)
    with files.output_folder(out):
        found = system.explain_model(open_net(what, order.dtype, order.device), Path(what).name)
        stem = files.free_name(out, f"{files.slug(Path(what).name)}.{key}", ".json").stem
        return found.lines(), found.save(out, stem)


def examines(by: str) -> bool:
    """Whether a system explains a model's idea of something, and writes a report, rather than single pictures."""
    return hasattr(cards.method(cards.parse_with(by)[0]), "examine")


def examine_into(
    what: str, prompt: str | None, by: str, order: Order, out: Path, options: dict[str, Any], on_step: Any = None
) -> list[Path]:
    """Explain a model's idea of ``what`` and write the report into folder ``out``; returns the files.

    Raises:
        Everything that :func:`explain` raises, and OSError.
    """
    build_all([by])
    with files.output_folder(out):
        model = load(order.model or DEFAULT_MODEL, dtype=order.dtype, device=order.device)
        [found] = explain(what, prompt, by=by, model=model, on_step=on_step, **options).maps
        return found.save(out)


def _reader(name: str | Path, order: Order) -> Any:
    """The model that reads, if the order names one."""
    from sfumato.models.readers import is_reader, load_reader

    if not is_reader(name):
        return None
    options = {} if order.dtype is None else {"dtype": order.dtype}
    return load_reader(name, device=order.device, **options)
