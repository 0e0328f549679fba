"""Explanations: where words acted in a picture, what an answer rests on, what a net or a model is made of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import cards, files, markup, protocol, valid, writing
from sfumato.app.batch import JobBatch, make_files
from sfumato.app.jobs import DEFAULT_MODEL, JobOptions, MakeOptions, load, make
from sfumato.app.pictures import fitting_size, is_picture, media_for, read_media, size_of
from sfumato.cards.signatures import with_signature
from sfumato.errors import BadInput, NotSupported
from sfumato.sampling.arguments import GenerateArguments

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from typing_extensions import Unpack

    from sfumato.models import Model
    from sfumato.sampling import Result


@dataclass(frozen=True, eq=False)
class Explanation:
    """What :func:`explain` found: per picture, the picture and what the system says about it (heat maps, for words).

    ``result`` is the generation it was found in, None for pictures that existed already and for what is not about one
    picture (a concept: ``maps`` holds what it is made of, ``images`` pictures of it).
    """

    images: list[Image]
    maps: list[Any]
    result: Result | None = None

    def __repr__(self) -> str:
        kinds = ", ".join(sorted({type(each).__name__ for each in self.maps}))
        return f"Explanation({len(self.images)} pictures, {kinds})"

    def _repr_html_(self) -> str:
        if len(self.maps) != len(self.images):  # a concept: what it is made of, and pictures of it
            shown = [("", image) for image in self.images]
        else:
            both = zip(self.maps, self.images, strict=True)
            shown = [("", maps.grid(image) if hasattr(maps, "grid") else image) for maps, image in both]
        return markup.gallery(repr(self), shown)


@with_signature(GenerateArguments, cards.parameters_of(MakeOptions))
def explain(
    what: str | Path | Image,
    prompt: str | None = None,
    *,
    words: str | Sequence[str] = (),
    model: str | Path | Model = DEFAULT_MODEL,
    by: str | None = None,
    with_: Any = (),
    **options: Unpack[GenerateArguments],
) -> Explanation | protocol.NetTable:
    """Where words of a prompt are in a picture; what in a picture led a reading model to its answer; what a concept is
    made of; or what the layers of a net know.

    With a system that explains nets ``what`` is a net - a built-in name, a folder, a module, a :class:`Model` - and its
    own table comes back; otherwise an :class:`Explanation`.

    Args:
        what: a prompt, to make pictures from and explain these; or a picture that exists (PIL, or a path together with
            ``prompt``; a picture that carries a recipe brings its own prompt). For systems that explain concepts a
            text, a picture, or a folder of pictures.
        prompt: what the existing picture shows; what a model that reads (``toy-clip``, ``toy-vqa``, any transformers
            folder) is asked about it: a text, a question, a class. A classifier and a detector need none.
        words: words or phrases to look for; none: every word.
        by: the system with its parameters, as for ``--with``; by default the one whose card says so.
        with_: systems that take part where a picture is made from a prompt, as in :func:`make`.
        options: when making pictures those of :func:`make`; for an existing picture ``steps`` (noise levels to look
            at), ``seed``, ``scheduler`` and ``size`` (width, height; by default about the model's own area).

    Raises:
        NoMatch: a word is not in the prompt. BadInput, UnknownName, NotSupported: as :func:`make` and :func:`load`.
    """
    if prompt is not None:
        valid.text(prompt, "prompt")
    if isinstance(what, str) and not os.path.exists(what):
        valid.text(what, "what")
    given: dict[str, Any] = {**options}
    system = _built(by, words)
    key = type(system).CARD.key
    beside = list(with_) if isinstance(with_, list | tuple) else [with_]
    if beside and not _makes(what, prompt, system, model):
        raise BadInput("with_ takes part where a picture is made; give a prompt to explain, or leave with_ out.")
    if isinstance(system, protocol.ExplainsNet) and not _is_read(system, what, model):
        return system.explain_net(open_net(what), **given)
    if isinstance(system, protocol.ExplainsConcept):
        found = system.explain_concept(load(model) if isinstance(model, str | Path) else model, what, prompt, **given)
        return Explanation(found.pictures, [found])
    if isinstance(system, protocol.ExplainsReading) and _reads(model):
        return _explain_reading(what, prompt, model, system, given)
    _refuse_reader(system, model)
    if isinstance(what, str) and prompt is None and not is_picture(what):
        if not isinstance(system, protocol.TakesPart):
            raise NotSupported(f"{key} explains pictures that exist; give one, and the prompt beside it.")
        result = make(what, model=model, with_=[system, *beside], **given)
        return Explanation(result.images, list(getattr(system, "maps", [])), result)
    image, prompt = _picture_and_prompt(what, prompt)
    if not isinstance(system, protocol.ExplainsImage):
        ways = protocol.serves(system)
        other = "; ".join(ways.get("explain", ()))
        raise NotSupported(
            f"{key} explains {other}, and {model if isinstance(model, str | Path) else model.name} draws: say a model "
            "that reads, such as --model toy-vit."
            if other
            else f"{key} explains pictures while they are made only; give a prompt instead of a picture."
        )
    loaded = load(model) if isinstance(model, str | Path) else model
    if isinstance(what, str | Path):
        image = media_for(loaded, image, what)
    size = given.pop("size", None) or fitting_size(loaded, size_of(image) or loaded.default_size[::-1])
    return Explanation([image], [system.explain_image(loaded, image, prompt, size=size, **given)])


def _built(by: str | None, words: str | Sequence[str] = ()) -> Any:
    """The system that explains, looking for ``words`` if any are given."""
    key, params = cards.parse_with(by or cards.default("explain"))
    if words:
        params["words"] = [words] if isinstance(words, str) else list(words)
    return cards.method(key)(**params)


def _makes(what: Any, prompt: str | None, system: Any, model: Any) -> bool:
    """Whether a picture is made from ``what`` to be explained."""
    if isinstance(system, protocol.ExplainsNet | protocol.ExplainsConcept) or not isinstance(what, str):
        return False
    reads = isinstance(system, protocol.ExplainsReading) and _reads(model)
    return prompt is None and not is_picture(what) and not reads


def _is_read(system: Any, what: Any, model: Any) -> bool:
    """Whether a system that explains both nets and what they make of pictures is given a picture to be read."""
    key = type(system).CARD.key
    shown = is_picture(str(what)) if isinstance(what, str | Path) else hasattr(what, "convert")
    if not shown or not isinstance(system, protocol.ExplainsReading):
        return False
    if not _reads(model):
        name = model if isinstance(model, str | Path) else model.name
        raise BadInput(f"{key} looks at a picture through a model that reads, and {name} draws; say --model toy-cnn.")
    return True


def _reads(model: Any) -> bool:
    """Whether a model, loaded or not, reads pictures or texts instead of drawing them."""
    if not isinstance(model, str | Path):
        return not hasattr(model, "denoiser")
    from sfumato.models.readers import is_reader

    return is_reader(model)


def _refuse_reader(system: Any, model: Any) -> None:
    """Raises NotSupported for a model that reads where a system looks at one that draws."""
    if not isinstance(system, protocol.ExplainsReading) and _reads(model):
        name = model if isinstance(model, str | Path) else model.name
        raise NotSupported(f"{type(system).CARD.key} looks at models that draw, and {name} reads: say --by lrp.")


def _explain_reading(
    what: str | Path | Image, prompt: str | None, model: Any, system: protocol.ExplainsReading, options: dict[str, Any]
) -> Explanation:
    """What a model that reads says about a picture or a text."""
    from sfumato.models.readers import load_reader

    if isinstance(model, str | Path):
        model = load_reader(model)
    if options.pop("size", None) is not None:
        raise BadInput(f"size is for models that draw; {model.name} looks at pictures in a size of its own.")
    if isinstance(what, str) and prompt is None and not is_picture(what):
        if model.kind != "texts":
            raise BadInput(f"{model.name} looks at pictures; give one, and what to ask as the prompt.")
        return Explanation([], [system.explain_reading(model, None, what, **options)])
    image = files.read_picture(what) if isinstance(what, str | Path) else what
    return Explanation([image], [system.explain_reading(model, image, prompt, **options)])


def open_net(what: Any, dtype: str | None = None, device: str = "cpu", config: str | None = None) -> Any:
    """A net to look into: a text-to-image model, a vector autoencoder, or a module that is called with pictures; one
    that is loaded passes through.

    Raises:
        UnknownName, BadWeights, NotSupported: nothing of this name, or nothing that looks at pictures.
    """
    from sfumato.models.nets.vector_ae import is_autoencoder, load_autoencoder
    from sfumato.models.readers import is_reader, load_net

    if not isinstance(what, str | Path):
        return what
    if is_autoencoder(what):
        return load_autoencoder(what)
    return load_net(what) if is_reader(what) else load(what, dtype=dtype, device=device, config=config)


# --- into files ------------------------------------------------------------------------------------------------------


@dataclass
class ExplainJob:
    """``what`` to explain, with the files to write: ``batch`` says model, device and whether to write maps.

    ``given`` holds what was said besides: ``prompt``, ``words`` and the options of :func:`explain`.
    """

    what: str
    by: str | None = None
    batch: JobBatch = field(default_factory=lambda: JobBatch([]))
    given: dict[str, Any] = field(default_factory=dict)

    def refuse(self, allowed: Sequence[str], why: str) -> None:
        """Raises BadInput for what was given and is not allowed."""
        more = {"maps": self.batch.maps, "model": self.batch.model, "with": self.batch.with_}
        given = [*self.given, *(name for name, value in more.items() if value)]
        wrong = [f"-{name}" if len(name) == 1 else f"--{name}" for name in given if name not in allowed]
        if wrong:
            raise BadInput(f"{' and '.join(wrong)} cannot be given {why}.")


def explain_files(
    job: ExplainJob, out: Path, on_step: Callable[[int, int, float], None] | None = None
) -> Iterator[str | Path | list[Path]]:
    """Explain and write what is found into ``out``, a folder or the name of the picture (what is written besides has
    its name, too): yields lines of text, and the files as soon as they are whole.

    Raises:
        Everything that :func:`explain` raises, and OSError. BadInput also for options that do not go with the system.
    """
    batch, what = job.batch, job.what
    if not os.path.exists(what):  # the name of a file need not be text
        valid.text(what, "what")
    prompt, options = job.given.get("prompt"), {k: v for k, v in job.given.items() if k not in ("words", "prompt")}
    system = _built(job.by)
    key = type(system).CARD.key
    model = batch.model or DEFAULT_MODEL
    reads = isinstance(system, protocol.ExplainsReading) and _reads(model)
    if isinstance(system, protocol.ExplainsNet) and not _is_read(system, what, model):
        job.refuse((), f"with {key}, which explains a net: give its name and the parameters of --by, nothing else")
        with writing.output(out) as (folder, named):
            table = system.explain_net(open_net(what, batch.dtype, batch.device, batch.config), Path(what).name)
            found: list[Path] = []

            def save(path: Path, new: bool) -> Path:
                found[:] = table.save(path.parent, path.stem, new=new)
                return path

            writing.create(folder, f"{writing.slug(Path(what).name)}.{key}", ".json", save, named)
            yield from table.lines()
            yield from found
    elif isinstance(system, protocol.ExplainsConcept):
        allowed = ("prompt", "model", *(set(JobOptions.model_fields) - {"n", "size"}))
        job.refuse(allowed, f"with --by {key}; see: sfumato methods {key}")
        with writing.output(out) as (folder, named):
            loaded = batch.load()
            finding = system.explain_concept(loaded, what, prompt, on_step=on_step, **options)
            if named is None:
                yield from finding.save(folder)
            else:
                yield files.save_png(named, finding.picture(), {"concept": what, "model": loaded.name, "by": job.by})
                yield from finding.save(folder, named.stem)
    elif prompt is None and not is_picture(what) and not reads:
        looking = [cards.to_recipe(_built(job.by, job.given.get("words") or ()))]
        batch.allow = [text for *_, text in cards.files_of(looking)]  # they were typed, or are the defaults
        batch.with_ = [*looking, *batch.with_]
        batch.jobs = [JobOptions(prompt=what, **options)]
        yield from make_files(batch, out, on_step)
    else:
        _refuse_reader(system, model)
        allowed = (
            "prompt",
            "words",
            "model",
            "maps",
            *(set(JobOptions.model_fields) - {"n", "guidance", "frames", "fps"}),
        )
        job.refuse(allowed, "for a picture that exists; it is not made anew")
        yield from _picture_into(job, key, reads, out, options)


def _picture_into(job: ExplainJob, key: str, reads: bool, out: Path, options: dict[str, Any]) -> Iterator[Path]:
    """Maps of a picture that exists, or of a text that is read."""
    batch, prompt = job.batch, job.given.get("prompt")
    name = batch.model or DEFAULT_MODEL
    text = prompt is None and not is_picture(job.what)
    image: Any = None
    if not reads:
        image, prompt = _picture_and_prompt(Path(job.what), prompt)
    elif not text:
        image = files.read_picture(job.what)
    with writing.output(out) as (folder, named):
        model = _load_reader(name, batch) if reads else batch.load()
        image = image if reads else media_for(model, image, job.what)
        what, question = (job.what, None) if text else (image, prompt)
        explained = explain(what, question, words=job.given.get("words") or (), by=job.by, model=model, **options)
        assert isinstance(explained, Explanation)
        [maps] = explained.maps
        about = {"model": model.name, "hash": model.weight_hash, "by": job.by or key}
        drawn, recipe = maps.grid(image), {"prompt": prompt, "picture": Path(job.what).name, **about}
        stem = f"{writing.slug(job.what if text else Path(job.what).stem)}.heat"
        path = writing.create(folder, stem, ".png", lambda path, new: files.save_png(path, drawn, recipe, new), named)
        yield path
        if batch.maps:
            yield maps.save(path.with_suffix(".safetensors"))


def _load_reader(name: str | Path, batch: JobBatch) -> Any:
    from sfumato.models.readers import load_reader

    options = {} if batch.dtype is None else {"dtype": batch.dtype}
    return load_reader(name, device=batch.device, **options)


def _picture_and_prompt(what: str | Path | Image, prompt: str | None) -> tuple[Any, str]:
    """A picture, or the frames (f h w 3) of a clip, and what it shows: as said, or as its recipe says."""
    if not isinstance(what, str | Path):
        if prompt is None:
            raise BadInput("explaining a picture needs the prompt: what does it show?")
        return what, JobOptions(prompt=prompt).prompt
    image = read_media(what)
    if prompt is None:
        try:
            prompt = str(files.read_recipe(what)[0].get("prompt", ""))
        except BadInput:
            raise BadInput(f"{what} carries no recipe, so say what it shows: --prompt, or prompt=.") from None
    return image, JobOptions(prompt=prompt).prompt
