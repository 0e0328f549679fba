"""What to make, as one set of checked options, and how it is carried out: for calls from Python and, as an
:class:`Order`, for the command line."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from sfumato import cards, checkpoints, clips, files, sheets
from sfumato.cards import Field
from sfumato.cards.signatures import spelt_out
from sfumato.errors import BadInput, NotAllowed, SfumatoError
from sfumato.sampling.arguments import GenerateArguments
from sfumato.sampling.options import Options
from sfumato.startup import collector_paused

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from PIL.Image import Image
    from typing_extensions import Unpack

    from sfumato.models import Model
    from sfumato.sampling import Result


DEFAULT_MODEL = "toy-sd"
PICTURES = files.PICTURES
ORIENTATION = 0x0112  # of EXIF
LONGEST_PROMPT = 1000  # words; about 17 chunks of CLIP


def readable(prompt: Any) -> Any:
    """A prompt or several, if each says something that can be read; else ValueError."""
    for text in [prompt] if isinstance(prompt, str) else prompt:
        if not text.strip():
            raise ValueError("a prompt must say something")
        words = len(text.split())
        if words > LONGEST_PROMPT or len(text) > 20 * LONGEST_PROMPT:
            raise ValueError(f"it has {words} words, {len(text)} characters; at most {LONGEST_PROMPT} words are read")
    return prompt


class JobOptions(Options):
    """What can be said about pictures of one prompt, besides the model. Checked before anything heavy is loaded."""

    SYSTEM = "make"

    prompt: str = Field(description="what the picture shows")  # type: ignore[assignment]
    negative: str | None = Field(default=None, description="what the picture should not show")  # type: ignore[assignment]
    n: int = Field(default=1, ge=1, le=100_000, description="how many pictures of each prompt")
    seed: int = Field(default=0, description="where the noise comes from; picture i uses seed + i")  # type: ignore[assignment]
    scheduler: str | None = Field(default=None, description="the scheduler by name, such as ddim, euler or dpm++")

    @field_validator("prompt")
    @classmethod
    def readable(cls, prompt: Any) -> Any:
        return readable(prompt)

    @field_validator("seed")
    @classmethod
    def _seeds(cls, seed: int) -> int:
        if not 0 <= seed < 2**62:
            raise ValueError("a seed must be 0 or above and below 2**62")
        return seed

    def arguments(self) -> dict[str, Any]:
        """The options that were given, as arguments of the sampling loop; the rest stays the model's own choice."""
        return _given(self)


def _given(options: Options) -> dict[str, Any]:
    given = options.model_dump(exclude_unset=True)
    return {name: value for name, value in given.items() if value is not None or name == "seed"}


class MakeOptions(Options):
    """The options of :func:`make`, which takes several prompts and seeds at once."""

    SYSTEM = "make"

    @field_validator("prompt")
    @classmethod
    def readable(cls, prompt: Any) -> Any:
        return readable(prompt)

    def arguments(self) -> dict[str, Any]:
        """As :meth:`JobOptions.arguments`."""
        return _given(self)


def load(
    name: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    config: str | Path | None = None,
) -> Model:
    """A model by built-in name, local diffusers folder, single ``.safetensors`` file or hub id.

    Args:
        name: ``"toy-sd"``, ``"path/to/folder"``, ``"model.safetensors"``, ``"org/model"``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype; None keeps the model's own.
        device: ``"cpu"``, ``"cuda"``, ...
        revision: commit, branch or tag of a hub id; it is recorded in every recipe.
        config: for a single file, a diffusers folder whose configuration, tokenizers and missing parts are used.

    Raises:
        UnknownName: nothing of this name. NotSupported: an unknown family. BadWeights: pickles, damaged or ill-fitting
        files.
    """
    found = checkpoints.find(str(name), revision)  # a wrong name is answered before anything heavy is imported
    with collector_paused():
        from sfumato.models import load as load_model

        commit = revision if found.repo is None else found.commit
        model = load_model(name, dtype=dtype, device=device, revision=commit, config=config)
    return model


@spelt_out(GenerateArguments, cards.parameters_of(MakeOptions))
def make(
    prompt: str | Sequence[str],
    *,
    model: str | Path | Model = DEFAULT_MODEL,
    with_: Any = (),
    allow: Sequence[str | Path] = (),
    image: Any = None,
    on_step: Callable[..., Any] | None = None,
    **options: Unpack[GenerateArguments],
) -> Result:
    """Generate pictures.

    Args:
        prompt: one text, or several: ``n`` pictures of each.
        model: a name for :func:`load`, or a loaded model.
        with_: systems that watch or change the generation: objects, or texts as on the command line
            (``"KEY:words=[red cube|ball]"``), or as recipes hold them.
        allow: files, or folders of files, that systems described by recipes may open (:func:`.cards.refuse_files`).
        image: a PIL picture to begin from instead of noise; ``strength`` says how much of it is drawn anew. Without
            ``size`` it is brought to about the model's own area, in its own shape.
        on_step: called after every denoising step with the loop's step record.
        options: see :class:`MakeOptions`: ``n``, ``negative``, ``steps``, ``guidance``, ``size`` (width, height in
            pixels), ``seed``, ``scheduler``, ... What is left out is the model's choice. Picture i uses ``seed`` + i
            and depends on its own seed only.

    Returns:
        A result with ``images`` (PIL; of clips their first frames), ``clips`` (bytes f h w 3), ``latents`` (b c h w),
        ``seeds``, ``recipes`` and ``coverage`` of each system.

    Raises:
        BadInput: an option is out of its range. UnknownName: model, system, option or parameter. NoMatch: a system
        touched nothing.
    """
    given: dict[str, Any] = {**options}
    checked = MakeOptions(prompt=prompt if isinstance(prompt, str) else list(prompt), **given)
    systems = build_all(with_, allow)

    from sfumato.sampling import generate

    loaded = load(model) if isinstance(model, str | Path) else model
    given = checked.arguments() | fitted_to(loaded, image, checked.size)
    return generate(loaded, **given, image=image, interventions=systems, on_step=on_step)


def is_picture(what: str) -> bool:
    """Whether a text names a file with a picture or clip rather than being a prompt."""
    return Path(what).suffix.lower() in (*PICTURES, *files.VIDEOS) and (" " not in what or Path(what).is_file())


def picture_and_prompt(what: str | Path | Image, prompt: str | None) -> tuple[Any, str]:
    """A picture, or the frames (f h w 3) of a clip, and what it shows: as said, or as its recipe says."""
    if not isinstance(what, str | Path):
        if prompt is None:
            raise BadInput("explaining a picture needs the prompt: what does it show?")
        return what, JobOptions(prompt=prompt).prompt
    image = read_shown(what)
    if prompt is None:
        try:
            prompt = str(files.read_recipe(what)[0].get("prompt", ""))
        except BadInput:
            raise BadInput(f"{what} carries no recipe, so say what it shows: --prompt, or prompt=.") from None
    return image, JobOptions(prompt=prompt).prompt


def read_shown(path: str | Path) -> Any:
    """What a file shows: a picture, or the frames (f h w 3) of a video. Raises BadInput, OSError."""
    return clips.read_clip(path)[0] if Path(path).suffix.lower() in files.VIDEOS else files.read_picture(path)


def as_taken(model: Model, shown: Any, path: str | Path) -> Any:
    """What a file shows as the model takes it: of a model of clips all frames, also of an animated picture. Raises
    BadInput for a video where the model makes pictures."""
    frames = hasattr(shown, "ndim")
    if model.clips and not frames:
        return clips.read_clip(path)[0]
    if frames and not model.clips:
        raise BadInput(f"{path} is a clip, but {model.name} makes pictures.")
    return shown


def size_of(shown: Any) -> tuple[int, int] | None:
    """(width, height) of a picture (PIL or an array), of frames (f h w 3) or of the first of several; None for tensors,
    which are as they shall be, and for what is none of these."""
    if isinstance(shown, list | tuple):
        return size_of(shown[0]) if shown else None
    if hasattr(shown, "getexif"):
        turned = shown.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
        return shown.size[::-1] if turned else shown.size
    if not hasattr(shown, "__array_interface__") or not 2 <= shown.ndim <= 4 or 0 in shown.shape:
        return None
    return (shown.shape[2], shown.shape[1]) if shown.ndim == 4 else (shown.shape[1], shown.shape[0])


def fitted_to(model: Model, image: Any, size: tuple[int, int] | None) -> dict[str, Any]:
    """The ``size`` of a run that begins from a picture: without one that was said, about the model's own area in the
    picture's shape (:func:`fitting_size`), as wherever a picture is brought along. Nothing without a picture."""
    own = None if image is None or size is not None else size_of(image)
    return {} if own is None else {"size": fitting_size(model, own)}


def fitting_size(model: Model, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of about the model's own area in the shape of ``size``, in the steps the model can make."""
    h, w = model.default_size
    scale, step = math.sqrt(w * h / (size[0] * size[1])), model.size_multiple
    width, height = (max(step, round(side * scale / step) * step) for side in size)
    return width, height


def offers(model: str | Path | Model, needs: Sequence[str]) -> bool:
    """Whether a model, loaded or not, has these capabilities; False where only loading will tell."""
    if not isinstance(model, str | Path):
        return all(model.family.has(each) for each in needs)
    from sfumato.models import family_at

    family = family_at(model)
    return family is not None and family.capabilities.issuperset(needs)


def suitable_model(needs: Sequence[str]) -> str:
    """The built-in model to use where nobody names one: the default one, or the first that has these capabilities."""
    from sfumato import registry

    return next((name for name in (DEFAULT_MODEL, *registry.names()) if offers(name, needs)), DEFAULT_MODEL)


def build_all(with_: Any, allow: Sequence[str | Path] = ()) -> list[Any]:
    """Systems from systems, ``--with`` texts and recipes of systems; a single one is taken as a list of one. ``allow``:
    what recipes may open. Raises BadInput for more than any run can use."""
    given = with_ if isinstance(with_, list | tuple) else [with_]
    if len(given) > cards.MOST_SYSTEMS:
        raise BadInput(f"{len(given)} systems are given; the most is {cards.MOST_SYSTEMS}.")
    return [_built(each, allow) for each in given]


def _built(given: Any, allow: Sequence[str | Path]) -> Any:
    if isinstance(given, str):
        return cards.build(given)
    return cards.from_recipe(given, allow) if isinstance(given, dict) else given


def models() -> dict[str, dict[str, Any]]:
    """The built-in models: name -> card (summary, sampling defaults, measured quality, recipe). Imports no torch."""
    from sfumato import registry

    return {name: registry.card(name) for name in registry.names()}


@dataclass
class Order:
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
    config: str | None = None
    expected: dict[str, Any] = field(default_factory=dict)
    maps: bool = False
    same_weights: bool = False
    allow: list[str | Path] = field(default_factory=list)

    def systems(self) -> list[Any]:
        """The systems, built anew."""
        return build_all(self.with_, self.allow)

    def load(self, model: str | Path | None = None) -> Model:
        """The model of this order, or another one, on its device and in its precision."""
        name = model or self.model or DEFAULT_MODEL
        return load(name, dtype=self.dtype, device=self.device, config=self.config)

    def pictures(self) -> list[JobOptions]:
        """The jobs spelt out: one entry, with one seed, per picture."""
        return [job.model_copy(update={"n": 1, "seed": job.seed + i}) for job in self.jobs for i in range(job.n)]


def like(picture: Path, typed: dict[str, Any], order: Order) -> Order:
    """``order`` completed by the recipe in ``picture``; what was typed, there or in ``order``, wins.

    The recipe is a stranger's: the models it may name are :func:`model_of`'s, its systems open no file that
    ``order.allow`` does not name, and every value is checked as if typed.
    """
    recipe, exact = files.read_recipe(picture)
    if recipe.get("edit") is not None:
        raise BadInput(f"{picture} is an edit; repeat it from its original: sfumato edit ORIGINAL --like {picture}.")
    known = {name: recipe[name] for name in JobOptions.model_fields if recipe.get(name) is not None and name != "n"}
    if exact:  # recipes that do not say come from versions that knew nothing else
        known.setdefault("long_prompts", "cut")
    if recipe.get("latents") is not None:
        raise BadInput(f"{picture} was made from latents that a program gave; only that program can repeat it.")
    if (recipe.get("image") is None) != (order.image is None):
        raise BadInput(
            f"{picture} was made {'without' if order.image else 'from'} a picture: --image must agree with that."
        )
    dropped = list(recipe.get("dropped", ())) if not exact else []
    guidance = typed.get("guidance") or known.get("guidance")
    if not exact and "negative" in known and guidance is not None and guidance <= 1:
        del known["negative"]
        dropped.append(f"the negative prompt, which has no effect at CFG {guidance:g}")
    model = order.model or recipe.get("model")
    if not exact and "clip_skip" in known and _reads_last_but_one(model or DEFAULT_MODEL):
        dropped.append(f"Clip skip {known.pop('clip_skip') + 1}, which is what SDXL does by itself")
    try:
        job = JobOptions(**{**known, **typed})
        with_ = order.with_ or _systems_of(recipe, order.allow)
        build_all(with_, order.allow)
    except NotAllowed as error:
        raise NotAllowed(f"{picture}: {error}") from None
    except SfumatoError as error:
        raise BadInput(f"the recipe in {picture} cannot be followed: {error}") from None
    if exact and not order.model:
        model = model_of(recipe, picture)
    if not exact:
        message = "its settings come from another program's text, so the picture will not be the same"
        message += f"; left out: {', '.join(map(str, dropped[:20]))}" if dropped else ""
        message += f" and {len(dropped) - 20} more" if len(dropped) > 20 else ""
        message += f"; it was made with {recipe['named_model']!r}" if recipe.get("named_model") else ""
        warnings.warn(RecipeDiffers(f"{picture}: {message}."), stacklevel=2)
    dtype = order.dtype or (str(recipe["dtype"]) if exact and recipe.get("dtype") else None)
    own = exact and not order.model
    expected = recipe if exact else {}
    return replace(order, jobs=[job], model=model, with_=with_, dtype=dtype, expected=expected, same_weights=own)


def model_of(recipe: dict[str, Any], picture: Path) -> str:
    """The model that a recipe names: a built-in one, or a folder or file that lies here. Whether its weights are those
    of the recipe shows when it is loaded (:func:`check_weights`).

    Raises BadInput for any other, such as a Hub id: a picture must not start a download.
    """
    from sfumato import registry

    named = recipe.get("model")
    if named in registry.names():
        return str(named)
    if isinstance(named, str) and isinstance(recipe.get("hash"), str):
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # too long for a path, a zero byte
            path = Path(named).expanduser()
            if checkpoints.is_pipeline(path) or (path.suffix == ".safetensors" and path.is_file()):
                return named
    raise BadInput(
        f"{picture} was made with the model {str(named)[:200]!r}, which is neither built in nor here; "
        "say --model yourself to load it, or another one."
    )


def _reads_last_but_one(model: str) -> bool:
    """Whether other programs read the last but one layer of this model's CLIPs whatever Clip skip says."""
    from sfumato.models import family_at

    family = family_at(model)
    return family is not None and family.name in ("sdxl", "sd3")


def _systems_of(recipe: dict[str, Any], allow: Sequence[str | Path]) -> list[Any]:
    """The systems in a stranger's recipe, as it describes them. Raises NotAllowed, BadInput."""
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


def carry_out(
    order: Order, out: Path, on_step: Callable[[int, int, float], None] | None = None
) -> Iterator[list[Path]]:
    """Make the pictures or clips of ``order`` one by one, yielding the files of each as soon as it is whole.

    ``out``: a folder, or the name of a file, which then also names the format; several go beside each other, numbered.
    One by one, so that each file is the same however many are made with it, and an interruption keeps what is finished.
    ``on_step`` hears (picture, of so many, share of it done).

    Raises:
        BadInput: ``out`` is a file of another format, or a file where a folder is meant. OSError: it cannot be written.
        Everything that :func:`make` raises.
    """
    pictures = order.pictures()
    order.systems()  # misspelt ones are refused before the model is loaded
    image = None if order.image is None else read_shown(order.image)
    with files.output(out, (".png", *clips.FORMATS)) as (folder, named):
        model = order.load()
        if named is not None and (out.suffix.lower() == ".png") == model.clips:
            kind, ends = ("clips", ", ".join(clips.FORMATS)) if model.clips else ("pictures", ".png")
            raise BadInput(f"{model.name} makes {kind}, so {out.name!r} must end in {ends}.")
        check_weights(order.expected, model, order.same_weights)
        if order.image is not None:
            image = as_taken(model, image, order.image)
            pictures = [job.model_copy(update=fitted_to(model, image, job.size)) for job in pictures]
        from sfumato.sampling import generate

        for index, options in enumerate(pictures):

            def report(step: Any, index: int = index) -> None:
                if on_step is not None:
                    on_step(index, len(pictures), (step.i + 1) / step.total)

            systems = order.systems()
            result = generate(model, **options.arguments(), image=image, interventions=systems, on_step=report)
            yield write(result, folder, order.maps, files.numbered(named, index, len(pictures)))


def write(result: Result, out: Path, maps: bool = False, at: Path | None = None, new: bool = False) -> list[Path]:
    """Write each picture or clip of ``result`` with its recipe, and beside it whatever pictures its systems drew.

    ``maps``: also the numbers behind these, as ``.safetensors``. ``at``: where the only picture of ``result`` goes;
    with ``new`` never onto a file that is there (FileExistsError).
    """
    written = []
    for index, image in enumerate(result.images):
        recipe = result.recipes[index]

        def save(path: Path, index: int = index, image: Any = image, recipe: Any = recipe) -> Path:
            if result.clips:
                return clips.save_clip(path, result.clips[index], recipe, recipe["fps"], new=new or at is None)
            return files.save_png(path, image, recipe, new=new or at is None)

        stem = f"{files.slug(result.prompts[index])}-{result.seeds[index]}"
        path = files.create(out, stem, ending(result), save) if at is None else save(at)
        written.append(path)
        for part in result.parts:
            drawn = part.pictures(result, index) if hasattr(part, "pictures") else {}
            for name, picture in drawn.items():
                written.append(files.save_png(path.with_name(f"{path.stem}.{files.slug(name)}.png"), picture, recipe))
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

    def save(path: Path) -> Path:
        with files.replacing(path, new=True) as file:
            sheets.sheet(cells, columns, gap=2).save(file, format="PNG")
        return path

    return files.create(made[0].parent, f"{made[0].stem}-grid-of-{len(made)}", ".png", save)


def ending(result: Result) -> str:
    """How the names of files end that hold the pictures or clips of a result, where nobody says."""
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
