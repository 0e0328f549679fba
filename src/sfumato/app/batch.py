"""Pictures of one command: a :class:`JobBatch`, filled from options or from the recipe in a picture, and written."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import cards, checkpoints, clips, files, sheets, writing
from sfumato.app.jobs import DEFAULT_MODEL, JobOptions, build_all, load_found
from sfumato.app.pictures import InputPictures, media_for, read_media
from sfumato.errors import BadInput, NotAllowed, SfumatoError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sfumato.models import Model
    from sfumato.sampling import Result


@dataclass
class JobBatch:
    """Pictures to make and write: one entry of ``jobs`` per prompt, with one model and the same systems for all.

    ``expected`` is the recipe that a picture to be repeated carries, to warn where model or versions differ from it.
    ``same_weights``: it must be those weights, for nobody but the recipe named the model. ``maps``: also write the
    numbers behind the pictures that systems draw. ``allow``: files that systems described by recipes may
    open.
    """

    jobs: list[JobOptions]
    model: str | None = None
    with_: list[Any] = field(default_factory=list)
    dtype: str | None = None
    device: str = "cpu"
    image: Path | None = None
    reference: list[Path] = field(default_factory=list)
    config: str | None = None
    expected: dict[str, Any] = field(default_factory=dict)
    maps: bool = False
    same_weights: bool = False
    allow: list[str | Path] = field(default_factory=list)

    def systems(self) -> list[Any]:
        """The systems, built anew."""
        return build_all(self.with_, self.allow)

    def load(self, model: str | Path | None = None) -> Model:
        """The model of this batch, or another one, on its device and in its precision."""
        name = model or self.model or DEFAULT_MODEL
        return load_found(checkpoints.find(str(name)), name, self.dtype, self.device, self.config, self.jobs)

    def inputs(self) -> InputPictures:
        """The pictures given with it, read. Raises BadInput, OSError."""
        image = None if self.image is None else read_media(self.image)
        return InputPictures(image, tuple(files.read_picture(path) for path in self.reference))

    def pictures(self) -> list[JobOptions]:
        """The jobs spelt out: one entry, with one seed, per picture."""
        return [job.model_copy(update={"n": 1, "seed": job.seed + i}) for job in self.jobs for i in range(job.n)]


def like(picture: Path, overrides: dict[str, Any], batch: JobBatch) -> JobBatch:
    """``batch`` completed by the recipe in ``picture``; ``overrides`` and what ``batch`` says win.

    The recipe is untrusted: the models it may name are :func:`model_of`'s, its systems open no file that
    ``batch.allow`` does not name, and every value is checked as if typed.
    """
    recipe, exact = files.read_recipe(picture)
    if recipe.get("edit") is not None:
        raise BadInput(f"{picture} is an edit; repeat it from its original: sfumato edit ORIGINAL --like {picture}.")
    known = {name: recipe[name] for name in JobOptions.model_fields if recipe.get(name) is not None and name != "n"}
    if exact:  # recipes that do not say come from versions that knew nothing else
        known.setdefault("long_prompts", "cut")
    if recipe.get("latents") is not None:
        raise BadInput(f"{picture} was made from latents that a program gave; only that program can repeat it.")
    if (recipe.get("image") is None) != (batch.image is None):
        raise BadInput(
            f"{picture} was made {'without' if batch.image else 'from'} a picture: --image must agree with that."
        )
    looked = recipe.get("reference") or []
    if not isinstance(looked, list) or len(looked) != len(batch.reference):
        count = len(looked) if isinstance(looked, list) else "damaged"
        raise BadInput(f"{picture} was made with {count} reference pictures: --reference must agree with that.")
    dropped = list(recipe.get("dropped", ())) if not exact else []
    guidance = overrides.get("guidance") or known.get("guidance")
    if not exact and "negative" in known and guidance is not None and guidance <= 1:
        del known["negative"]
        dropped.append(f"the negative prompt, which has no effect at CFG {guidance:g}")
    model = batch.model or recipe.get("model")
    if not exact and "clip_skip" in known and _penultimate(model or DEFAULT_MODEL):
        dropped.append(f"Clip skip {known.pop('clip_skip') + 1}, which is what SDXL does by itself")
    try:
        job = JobOptions(**{**known, **overrides})
        with_ = batch.with_ or _systems_of(recipe, batch.allow)
        build_all(with_, batch.allow)
    except NotAllowed as error:
        raise NotAllowed(f"{picture}: {error}") from None
    except SfumatoError as error:
        raise BadInput(f"the recipe in {picture} cannot be followed: {error}") from None
    if exact and not batch.model:
        model = model_of(recipe, picture)
    if not exact:
        message = "its settings come from another program's text, so the picture will not be the same"
        message += f"; left out: {', '.join(map(str, dropped[:20]))}" if dropped else ""
        message += f" and {len(dropped) - 20} more" if len(dropped) > 20 else ""
        message += f"; it was made with {recipe['named_model']!r}" if recipe.get("named_model") else ""
        warnings.warn(RecipeDiffers(f"{picture}: {message}."), stacklevel=2)
    dtype = batch.dtype or (str(recipe["dtype"]) if exact and recipe.get("dtype") else None)
    own = exact and not batch.model
    expected = recipe if exact else {}
    return replace(batch, jobs=[job], model=model, with_=with_, dtype=dtype, expected=expected, same_weights=own)


def model_of(recipe: dict[str, Any], picture: Path, beside: Path | None = None) -> str:
    """The model that a recipe names: a built-in one, or a folder or file that lies here; what was named from another
    folder than this one, from one in which the picture, or what it lies ``beside``, is. Whether its weights are those
    of the recipe shows when it is loaded (:func:`check_weights`).

    Raises BadInput for any other, such as a Hub id: a picture must not start a download.
    """
    from sfumato import registry

    named = recipe.get("model")
    if named in registry.names():
        return str(named)
    elsewhere = str(named).replace("\\", "/").startswith("//")  # another computer's share: asking is telling it
    if isinstance(named, str) and isinstance(recipe.get("hash"), str) and not elsewhere:
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # too long for a path, a zero byte
            path = Path(named).expanduser()
            for folder in (Path(), *(beside or picture).resolve().parents[:4]):
                found = folder / path  # which is the path itself where that is absolute
                if checkpoints.is_pipeline(found) or (found.suffix == ".safetensors" and found.is_file()):
                    return named if folder == Path() else str(found)
    raise BadInput(
        f"{picture} was made with the model {str(named)[:200]!r}, which is neither built in nor here; "
        "say --model yourself to load it, or another one."
    )


def _penultimate(model: str) -> bool:
    """Whether other programs read the last but one layer of this model's CLIPs whatever Clip skip says."""
    from sfumato.models import family_at

    family = family_at(model)
    return family is not None and family.penultimate_clip_layer


def _systems_of(recipe: dict[str, Any], allow: Sequence[str | Path]) -> list[Any]:
    """The systems in an untrusted recipe, as it describes them. Raises NotAllowed, BadInput."""
    with_ = recipe.get("with") or []
    if not (isinstance(with_, list) and all(isinstance(each, str | dict) for each in with_)):
        raise BadInput("its list of systems is damaged.")
    if len(with_) > cards.MOST_SYSTEMS:
        raise BadInput(f"it has {len(with_)} systems; the most is {cards.MOST_SYSTEMS}.")
    tagged = []
    prompt = recipe.get("prompt")
    if isinstance(prompt, str) and "<" in prompt:  # its <lora:name:scale>
        from sfumato.text.dialects import TAGGED, adapter_tags

        tagged = [{"method": TAGGED, "params": {"file": name}} for name, _ in adapter_tags(prompt)[1]]
    cards.refuse_files([*with_, *tagged], allow)
    return with_


class RecipeDiffers(UserWarning):
    """A picture that is to be repeated was made by other weights or versions, so it may come out differently."""


def make_files(
    batch: JobBatch, out: Path, on_step: Callable[[int, int, float], None] | None = None
) -> Iterator[list[Path]]:
    """Make the pictures or clips of ``batch`` one by one, yielding the files of each as soon as it is whole.

    ``out``: a folder, or the name of a file, which then also names the format; several go beside each other, numbered.
    One by one, so that each file is the same however many are made with it, and an interruption keeps what is finished.
    ``on_step`` hears (picture, of so many, share of it done).

    Raises:
        BadInput: ``out`` is a file of another format, or a file where a folder is meant. OSError: it cannot be written.
        Everything that :func:`make` raises.
    """
    pictures = batch.pictures()
    batch.systems()  # misspelt ones are refused before the model is loaded
    inputs = batch.inputs()
    with writing.output(out, (".png", *clips.FORMATS)) as (folder, named):
        model = batch.load()
        if named is not None and (out.suffix.lower() == ".png") == model.clips:
            kind, ends = ("clips", ", ".join(clips.FORMATS)) if model.clips else ("pictures", ".png")
            raise BadInput(f"{model.name} makes {kind}, so {out.name!r} must end in {ends}.")
        check_weights(batch.expected, model, batch.same_weights)
        if batch.image is not None:
            inputs = replace(inputs, image=media_for(model, inputs.image, batch.image))
        from sfumato.sampling import generate

        for index, options in enumerate(pictures):

            def report(step: Any, index: int = index) -> None:
                if on_step is not None:
                    on_step(index, len(pictures), (step.i + 1) / step.total)

            given = options.arguments() | inputs.arguments(model, options.size)
            result = generate(model, **given, interventions=batch.systems(), on_step=report)
            yield write(result, folder, batch.maps, writing.numbered(named, index, len(pictures)))


def write(result: Result, out: Path, maps: bool = False, at: Path | None = None, new: bool = False) -> list[Path]:
    """Write each picture or clip of ``result`` with its recipe, and beside it whatever pictures its systems drew.

    ``maps``: also the numbers behind these, as ``.safetensors``. ``at``: where the only picture of ``result`` goes;
    with ``new`` never onto a file that is there (FileExistsError).
    """
    written = []
    for index, image in enumerate(result.images):
        recipe = result.recipes[index]

        def save(path: Path, free: bool, index: int = index, image: Any = image, recipe: Any = recipe) -> Path:
            if result.clips:
                return clips.save_clip(path, result.clips[index], recipe, recipe["fps"], new=new or free)
            return files.save_png(path, image, recipe, new=new or free)

        stem = f"{writing.slug(result.prompts[index])}-{result.seeds[index]}"
        path = writing.create(out, stem, ending(result), save, at)
        written.append(path)
        for part in result.parts:
            drawn = part.pictures(result, index) if hasattr(part, "pictures") else {}
            for name, picture in drawn.items():
                written.append(files.save_png(path.with_name(f"{path.stem}.{writing.slug(name)}.png"), picture, recipe))
            if maps and hasattr(part, "maps"):
                written.append(part.maps[index].save(path.with_name(f"{path.stem}.{part.name}.safetensors")))
    return written


def write_grid(made: Sequence[Path]) -> Path:
    """All pictures that were made as one, beside the first of them; of clips a strip of each. Returns where it is."""
    cells: list[Any] = []
    if made[0].suffix.lower() in clips.FORMATS:
        strips = [sheets.strip(list(clips.read_clip(each)[0])) for each in made]
        columns = max(map(len, strips))
        for strip in strips:
            cells += [*strip, *[None] * (columns - len(strip))]
    else:
        cells, columns = [files.read_picture(each) for each in made], math.ceil(math.sqrt(len(made)))

    def save(path: Path, new: bool) -> Path:
        with writing.atomic_write(path, new=new) as file:
            sheets.sheet(cells, columns, gap=2).save(file, format="PNG")
        return path

    return writing.create(made[0].parent, f"{made[0].stem}-grid-of-{len(made)}", ".png", save)


def ending(result: Result) -> str:
    """How the names of files end that hold the pictures or clips of a result, by default."""
    return ".mp4" if result.clips else ".png"


def check_weights(expected: dict[str, Any], model: Model, same: bool = False) -> None:
    """Say so when the picture to be repeated was made by other weights or versions than are here.

    Raises BadInput for other weights where they must be the ``same``: a model that nobody but a recipe has named."""
    if not expected:
        return
    if expected.get("hash") != model.weight_hash:
        then = str(expected.get("hash"))[:10]
        difference = f"other weights of {model.name} here ({model.weight_hash[:10]}) than then ({then})"
        if same:
            raise BadInput(f"the picture was made with {difference}; --model {model.name} takes these all the same.")
        warnings.warn(RecipeDiffers(f"{difference}: the picture will differ."), stacklevel=2)
    versions = expected.get("versions")
    for name in ("torch", "diffusers", "transformers"):
        then = str(versions.get(name))[:20] if isinstance(versions, dict) else "unknown"
        if then != metadata.version(name):
            difference = f"{name} is {metadata.version(name)} here and was {then} then"
            warnings.warn(RecipeDiffers(f"{difference}: the picture may differ in small ways."), stacklevel=2)
