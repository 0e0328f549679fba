"""The verbs of the public face: what ``sfumato.make(...)`` and the command line do, on one set of checked options."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from sfumato import cards, files
from sfumato.cards import Field, Params
from sfumato.errors import BadInput, NotSupported, SfumatoError, UnknownName, WorkInterrupted

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

    from sfumato.models import Model
    from sfumato.sampling import Result

DEFAULT_MODEL = "toy-sd"
INPAINT_MODEL = "toy-sd-inpaint"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LONGEST_PROMPT = 1000  # words; the longest text encoder of any supported family reads 512 tokens


def _readable(prompt: Any) -> Any:
    """A prompt or several, if each says something that can be read; else ValueError."""
    for text in [prompt] if isinstance(prompt, str) else prompt:
        if not text.strip():
            raise ValueError("a prompt must say something")
        if len(text.split()) > LONGEST_PROMPT or len(text) > 20 * LONGEST_PROMPT:
            raise ValueError(f"it has {len(text.split())} words; no text encoder reads more than {LONGEST_PROMPT}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("it is not valid text (a character cannot be encoded)") from None
    return prompt


class JobOptions(Params):
    """What can be said about pictures of one prompt, besides the model. Checked before anything heavy is loaded."""

    SYSTEM = "make"

    prompt: str = Field(description="what the picture shows")
    negative: str | None = Field(default=None, description="what the picture should not show")
    n: int = Field(default=1, ge=1, le=100_000, description="how many pictures of each prompt")
    steps: int | None = Field(default=None, ge=1, le=1000, description="how many denoising steps")
    guidance: float | None = Field(default=None, ge=0, description="strength of classifier-free guidance")
    rescale: float | None = Field(default=None, ge=0, le=1, description="guidance rescale, 0 off")
    size: tuple[int, int] | None = Field(
        default=None, description="width and height of the picture", json_schema_extra={"unit": "pixel"}
    )
    seed: int = Field(default=0, description="where the noise comes from; picture i uses seed + i")
    scheduler: str | None = Field(default=None, description="the scheduler by name, such as ddim, euler or dpm++")
    eta: float | None = Field(default=None, ge=0, le=1, description="share of fresh noise in DDIM steps")
    guidance_interval: tuple[float, float] | None = Field(
        default=None, description="fractions of progress between which guidance acts"
    )
    true_guidance: float | None = Field(
        default=None, ge=0, description="classifier-free guidance on top of a guidance-distilled model's own"
    )
    compose: list[tuple[str, float]] = Field(default=[], description="further texts with their weights")
    strength: float | None = Field(
        default=None, ge=0, le=1, description="how much of a given picture is drawn anew, 0 nothing, 1 all"
    )

    @field_validator("prompt")
    @classmethod
    def _readable(cls, prompt: Any) -> Any:
        return _readable(prompt)

    @field_validator("size")
    @classmethod
    def _positive(cls, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if size is not None and not all(1 <= side <= 8192 for side in size):
            raise ValueError("each side must lie between 1 and 8192")
        return size

    @field_validator("seed")
    @classmethod
    def _seeds(cls, seed: Any) -> Any:
        for number in seed if isinstance(seed, list) else [seed]:
            if number is not None and not 0 <= number < 2**62:
                raise ValueError("a seed must be 0 or above and below 2**62")
        return seed

    def arguments(self) -> dict[str, Any]:
        """The options as arguments of the sampling loop; what was left open stays the model's own choice."""
        given = {name: value for name, value in self.model_dump().items() if value is not None or name == "seed"}
        interval = given.pop("guidance_interval", (0.0, 1.0))
        if interval != (0.0, 1.0):
            from sfumato.sampling import Guidance

            if "guidance" not in given or "true_guidance" in given:
                raise BadInput("guidance_interval needs guidance, and goes with classifier-free guidance only.")
            given["guidance"] = Guidance(given["guidance"], given.pop("rescale", 0.0), interval)
        return given


class MakeOptions(JobOptions):
    """The options of :func:`make`, which takes several prompts and seeds at once."""

    prompt: str | list[str] = Field(description="what the pictures show")  # type: ignore[assignment]
    seed: int | list[int] | None = Field(  # type: ignore[assignment]
        default=0, description="where the noise comes from: a number or one per picture"
    )


def load(
    name: str | Path,
    dtype: Any = None,
    device: str = "cpu",
    revision: str | None = None,
) -> Model:
    """A model by built-in name, local diffusers folder, single ``.safetensors`` file or hub id.

    Args:
        name: ``"toy-sd"``, ``"path/to/folder"``, ``"model.safetensors"``, ``"org/model"``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype; None keeps the model's own.
        device: ``"cpu"``, ``"cuda"``, ...
        revision: commit, branch or tag of a hub id; it is recorded in every recipe.

    Raises:
        UnknownName: nothing of this name. NotSupported: an unknown family. BadWeights: pickles, damaged or ill-fitting
        files.
    """
    from sfumato.models import load as load_model

    return load_model(name, dtype=dtype, device=device, revision=revision)


def make(
    prompt: str | Sequence[str],
    *,
    model: str | Path | Model = DEFAULT_MODEL,
    with_: Any = (),
    image: Any = None,
    on_step: Callable[..., Any] | None = None,
    **options: Any,
) -> Result:
    """Generate pictures.

    Args:
        prompt: one text, or several: ``n`` pictures of each.
        model: a name for :func:`load`, or a loaded model.
        with_: systems that watch or change the generation: objects, or texts as on the command line
            (``"daam:words=[red cube|ball]"``).
        image: a PIL picture to begin from instead of noise; ``strength`` says how much of it is drawn anew.
        on_step: called after every denoising step with the loop's step record.
        options: see :class:`MakeOptions`: ``n``, ``negative``, ``steps``, ``guidance``, ``size`` (width, height in
            pixels), ``seed``, ``scheduler``, ... What is left out is the model's choice. Picture i uses ``seed`` + i
            and depends on its own seed only.

    Returns:
        A result with ``images`` (PIL), ``latents`` (b c h w), ``seeds``, ``recipes`` and ``coverage`` of each system.

    Raises:
        BadInput: an option is out of its range. UnknownName: model, system, option or parameter. NoMatch: a system
        touched nothing.
    """
    checked = MakeOptions(prompt=prompt if isinstance(prompt, str) else list(prompt), **options)
    systems = build_all(with_)

    from sfumato.sampling import generate

    loaded = load(model) if isinstance(model, str | Path) else model
    return generate(loaded, **checked.arguments(), image=image, interventions=systems, on_step=on_step)


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
    image, prompt = _picture_and_prompt(what, prompt)
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


class EditOptions(Params):
    """What can be said about an edit, besides the model and the parameters of the systems."""

    SYSTEM = "edit"

    prompt: list[str] = Field(min_length=1, description="what the edited pictures show")
    from_: str | None = Field(default=None, description="what the picture shows now")
    steps: int | None = Field(default=None, ge=1, le=1000, description="how many denoising steps")
    guidance: float | None = Field(default=None, ge=0, description="strength of classifier-free guidance")
    size: tuple[int, int] | None = Field(
        default=None, description="width and height to cut the picture to", json_schema_extra={"unit": "pixel"}
    )
    inner: int | None = Field(
        default=None, ge=0, le=100, description="iterations of null-text optimisation per step, 0 none, 10 if not said"
    )
    refine: int | None = Field(default=None, ge=0, le=20, description="fixed-point iterations per step of inversion")
    invert: bool = Field(default=False, description="invert the picture even if it carries its recipe")
    seed: int | None = Field(default=None, ge=0, lt=2**62, description="inpainting: where the noise comes from, 0")

    @field_validator("prompt", "from_")
    @classmethod
    def _readable(cls, given: Any) -> Any:
        return given if given is None else _readable(given)

    def told(self) -> dict[str, Any]:
        """How to open the picture, as far as it was said."""
        names = ("steps", "guidance", "size", "inner", "refine", "seed")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, eq=False)
class Edits:
    """What :func:`edit` made: one result per new prompt, and the opened ``original``, which further edits can be given
    in place of the picture (inpainting: the picture itself, as it was cut)."""

    original: Any
    results: list[Result]
    recipes: list[dict[str, Any]]

    @property
    def images(self) -> list[Image]:
        """The edited pictures."""
        return [result.images[0] for result in self.results]


def edit(
    image: str | Path | Image | Any,
    prompt: str | Sequence[str],
    *,
    from_: str | None = None,
    mask: Any = None,
    model: str | Path | Model | None = None,
    with_: Any = (),
    on_step: Callable[..., Any] | None = None,
    **options: Any,
) -> Edits:
    """Change what a picture shows by its prompt, and keep the rest of it.

    By Prompt-to-Prompt; or by inpainting, where ``inpaint`` is among the systems or the model is an inpainting one and
    there is a mask: the region is then drawn anew without regard to what was there, and nothing is inverted.

    Args:
        image: a PNG made by sfumato, which is drawn again from its own noise; any other picture (path or PIL), which is
            inverted and needs ``from_``; or the ``original`` of earlier edits, whose further edits cost their own rows.
        prompt: what the edited picture shows; several make several pictures.
        from_: what the picture shows now.
        mask: white where the picture may change, as a file, picture, array or tensor; everything else is kept.
        model: by default the one in the recipe, else toy-sd; for inpainting toy-sd-inpaint.
        with_: systems that take part; ``prompt_to_prompt`` or ``inpaint`` among them sets the edit's own parameters.
            With another system of the verb edit (``inject_fusion``, ``pullback``), and no such parameters, that one
            edits alone.
        options: parameters of ``prompt_to_prompt`` (``mode``, ``reweight={"ball": 2.0}``, ``blend="ball"`` ...), and
            for pictures that are inverted those of :class:`EditOptions`: ``steps``, ``guidance``, ``size``, ``inner``,
            ``refine``, ``invert``. For inpainting ``steps``, ``guidance``, ``size`` and ``seed``.

    Raises:
        BadInput: no recipe and no ``from_``, or an option is out of its range. NoMatch: a word is in neither prompt.
    """
    from sfumato.edit.original import Original

    systems = with_ if isinstance(with_, list | tuple) else [with_]
    asked = any(_named(each)[0] == "inpaint" for each in systems)
    if asked or (mask is not None and _inpaints(model)):
        return _inpainted(
            image, prompt, from_, mask, INPAINT_MODEL if model is None else model, systems, on_step, options
        )
    named = cards.method("prompt_to_prompt").Params.model_fields  # type: ignore[attr-defined]
    params: dict[str, Any] = {name: options.pop(name) for name in list(options) if name in named}
    others = []
    for each in systems:
        key, given = _named(each)
        if key == "prompt_to_prompt":
            params = {**given, **params}
        elif key == "blend" and given.get("source") is None:
            raise BadInput(
                "blend redraws a region of a picture to begin from; in an edit --mask (mask=) says what may change, or "
                "begin from the picture: sfumato make PROMPT --image PICTURE --strength 1 --with blend:mask=MASK."
            )
        else:
            others.append(each)
    params = {name: value for name, value in params.items() if value is not None}
    shipped = cards.methods("edit")
    if not params and any(_named(each)[0] in shipped for each in others):
        params = {"strength": 0.0}  # another system does the editing
    if params.get("source") is not None:
        from_ = from_ or params["source"]
    params.pop("source", None)
    checked = EditOptions(prompt=[prompt] if isinstance(prompt, str) else list(prompt), from_=from_, **options)
    if checked.seed is not None:
        raise BadInput("seed is for inpainting (--with inpaint); Prompt-to-Prompt begins from the picture's own noise.")
    cards.method("prompt_to_prompt")(source="x", **params)  # told before anything heavy is loaded
    build_all(others)
    whole_mask = None if mask is None else _mask(mask)
    if isinstance(image, Original):
        if checked.told() or from_ is not None:
            raise BadInput(
                "an opened original is edited as it was opened; only its prompt, mask and systems can be set."
            )
        original, about = image, dict(image.facts.get("about", {}))
    else:
        original, about = _open(image, checked, params, model, on_step)
        original.facts["about"] = about
        size = files.read_picture(image).size if isinstance(image, str | Path) else image.size
        if whole_mask is not None and whole_mask.size != size:
            told = f"{whole_mask.width}x{whole_mask.height}"
            raise BadInput(f"the mask is {told}, but the picture is {size[0]}x{size[1]}; they must agree.")
    results, recipes = [], []
    for text in checked.prompt:
        result = original.edit(text, mask=whole_mask, with_=build_all(others), on_step=on_step, **params)
        edited = next(part for part in result.parts if part.name == "prompt_to_prompt")
        block = {
            **about,
            "mask": None if whole_mask is None else files.pixel_hash(whole_mask),
            "with": [cards.to_recipe(edited), *[_recipe_of_system(each) for each in build_all(others)]],
        }
        results.append(result)
        recipes.append({**result.recipe, "edit": block})
    return Edits(original, results, recipes)


def _inpaints(model: Any) -> bool:
    """Whether this model, loaded or not, is made for redrawing regions."""
    if model is None:
        return False
    if isinstance(model, str | Path):
        from sfumato.models import family_at

        family = family_at(model)
        return family is not None and family.inpaints
    return model.family.inpaints


def _inpainted(
    image: Any,
    prompt: str | Sequence[str],
    from_: str | None,
    mask: Any,
    model: str | Path | Model,
    with_: Sequence[Any],
    on_step: Any,
    options: dict[str, Any],
) -> Edits:
    """Edits by an inpainting model: the region is drawn anew, the pixels around it are kept."""
    params: dict[str, Any] = {}
    others: list[Any] = []
    for each in with_:
        key, given = _named(each)
        if key == "inpaint":
            params |= given
        else:
            others.append(each)
    foreign = [name for name in ("inner", "refine", "invert") if options.get(name)]
    foreign += [name for name in cards.method("prompt_to_prompt").Params.model_fields if options.get(name)]  # type: ignore[attr-defined]
    foreign += ["from"] if from_ is not None else []
    if foreign:
        raise BadInput(f"{foreign[0]} is for edits by Prompt-to-Prompt; inpainting takes a prompt and a region only.")
    if not (isinstance(image, str | Path) or hasattr(image, "convert")):
        raise BadInput("inpainting takes a picture (a path or PIL), not one opened for Prompt-to-Prompt.")
    checked = EditOptions(prompt=[prompt] if isinstance(prompt, str) else list(prompt), **options)
    picture = files.read_picture(image) if isinstance(image, str | Path) else image
    whole = None if mask is None else _mask(mask)
    if whole is not None:
        if params.get("mask"):
            raise BadInput("the mask is given twice: as mask and within inpaint.")
        if whole.size != picture.size:
            told = f"{whole.width}x{whole.height}"
            raise BadInput(f"the mask is {told}, but the picture is {picture.width}x{picture.height}; they must agree.")
    system = cards.method("inpaint")
    system(**params)  # told before anything heavy is loaded
    build_all(others)

    from sfumato.sampling import generate

    loaded = load(model) if isinstance(model, str | Path) else model
    size = checked.size or fitting_size(loaded, picture.size)
    fitted = files.fitted(picture.convert("RGB"), size)
    region = {} if whole is None else {"mask": files.fitted(whole, size, smooth=False)}
    about = {
        "picture": Path(image).name if isinstance(image, str | Path) else None,
        "pixels": files.pixel_hash(picture),
        "from": None,
        "invert": False,
        "options": {name: list(v) if isinstance(v, tuple) else v for name, v in checked.told().items()},
        "mask": None if whole is None else files.pixel_hash(whole),
        "with": [cards.to_recipe(system(**params)), *[_recipe_of_system(each) for each in build_all(others)]],
    }
    asked = (("steps", checked.steps), ("guidance", checked.guidance))
    settings: dict[str, Any] = {name: v for name, v in asked if v is not None}
    results, recipes = [], []
    for text in checked.prompt:
        parts = [system(**{**params, **region}), *build_all(others)]
        result = generate(
            loaded, text, image=fitted, strength=1.0, seed=checked.seed or 0, interventions=parts, on_step=on_step,
            **settings,
        )  # fmt: skip
        results.append(result)
        recipes.append({**result.recipe, "edit": about})
    return Edits(fitted, results, recipes)


def _open(
    image: Any, options: EditOptions, params: dict[str, Any], model: str | Path | Model | None, on_step: Any
) -> tuple[Any, dict[str, Any]]:
    """A picture opened for editing, and what a recipe says about that."""
    from sfumato.edit.original import Original

    path = Path(image) if isinstance(image, str | Path) else None
    picture = files.read_picture(path) if path is not None else image
    about = {
        "picture": path.name if path is not None else None,
        "pixels": files.pixel_hash(picture),
        "from": options.from_,
        "invert": options.invert,
        "options": {name: list(v) if isinstance(v, tuple) else v for name, v in options.told().items()},
    }
    recipe: dict[str, Any] = {}
    if path is not None:
        try:
            recipe, exact = files.read_recipe(path)
        except BadInput:
            exact = False
        fresh = all(recipe.get(name) is None for name in ("edit", "image", "latents"))
        if exact and fresh and not options.invert:
            return _replayed(path, picture, options, params, model, on_step), about
    prompt = options.from_ or (str(recipe["prompt"]) if recipe.get("prompt") else None)
    if prompt is None:
        what = f"{path} carries" if path is not None else "the picture carries"
        raise BadInput(f"{what} no recipe, so say what it shows now: --from, or from_=.")
    prompt = JobOptions(prompt=prompt).prompt
    loaded = load(DEFAULT_MODEL if model is None else model) if isinstance(model, str | Path | None) else model
    told = {"size": fitting_size(loaded, picture.size), **options.told()}
    return Original.inverted(loaded, picture, prompt, edit=params, on_step=on_step, **told), about


def _replayed(
    path: Path, picture: Image, options: EditOptions, params: dict[str, Any], model: Any, on_step: Any
) -> Any:
    from sfumato.edit.original import Original

    if options.told():
        names = " and ".join(options.told())
        raise BadInput(f"{names} cannot be given for {path}, which is drawn again by its recipe; or add invert.")
    named = str(model) if isinstance(model, str | Path) else getattr(model, "name", None)
    order = like(path, {}, Order([], named))
    if options.from_ is not None and options.from_ != order.jobs[0].prompt:
        raise BadInput(
            f"from is {options.from_!r}, but {path} says that it shows {order.jobs[0].prompt!r}; or add invert."
        )
    loaded = load(order.model or DEFAULT_MODEL, dtype=order.dtype) if isinstance(model, str | Path | None) else model
    _warn_if_different(order.expected, loaded)
    original = Original.replayed(
        loaded,
        picture,
        order.jobs[0].arguments() | {"n": 1},
        parts=build_all(order.with_),
        edit=params,
        on_step=on_step,
    )
    if original.fidelity < 60:  # rounding to 8 bits alone leaves equal pictures
        told = "its recipe makes another picture here" if original.fidelity else "it was cut or resized"
        warnings.warn(
            RecipeDiffers(f"{path}: {told}, and that one is edited; --invert edits the picture in the file."),
            stacklevel=3,
        )
    return original


def _named(system: Any) -> tuple[str, dict[str, Any]]:
    """Key and parameters of a system given in any form."""
    if isinstance(system, str):
        key, given = cards.parse_with(system)
        return key.strip().replace("-", "_"), given
    if isinstance(system, dict):
        params = system.get("params", {})
        return str(system.get("method")), dict(params) if isinstance(params, dict) else {}
    return (system.CARD.key, system.params.model_dump()) if hasattr(system, "CARD") else ("", {})


def _mask(given: Any) -> Image:
    """A mask in any form as grey levels."""
    from PIL import Image as pictures

    from sfumato import masks

    return pictures.fromarray((masks.read_mask(given) * 255).round().byte().numpy())


def _recipe_of_system(system: Any) -> dict[str, Any]:
    return cards.to_recipe(system) if hasattr(system, "CARD") else {"method": system.name, "params": {}}


def edit_like(picture: Path, image: Path, mask: Path | None) -> dict[str, Any]:
    """Arguments of :func:`edit` that make the edit ``picture`` again from its original ``image`` (and ``mask``).

    Raises:
        BadInput: it is no edit, its recipe is damaged, or image or mask are not those it was made from.
    """
    recipe, exact = files.read_recipe(picture)
    block = recipe.get("edit")
    if not exact or not isinstance(block, dict):
        raise BadInput(f"{picture} is no edit made by sfumato; repeat it with: sfumato make --like {picture}.")
    if files.pixel_hash(files.read_picture(image)) != block.get("pixels"):
        raise BadInput(f"{image} is not the picture that {picture} was edited from.")
    if (files.pixel_hash(_mask(mask)) if mask is not None else None) != block.get("mask"):
        raise BadInput(f"{mask or 'no mask'} is not the mask that {picture} was edited from.")
    options = block.get("options")
    with_ = block.get("with")
    if not isinstance(options, dict) or not isinstance(with_, list):
        raise BadInput(f"{picture} carries a damaged recipe; give the prompt and settings yourself.")
    known = {name: value for name, value in options.items() if name in EditOptions.model_fields}
    for each in with_:  # what the picture showed is known from "from", or from its own recipe
        if isinstance(each, dict) and isinstance(each.get("params"), dict):
            each["params"].pop("source", None)
    return {
        **known,
        "prompt": str(recipe.get("prompt")),
        "from_": block.get("from"),
        "invert": bool(block.get("invert")),
        "with_": with_,
        "expected": recipe,
    }


def edit_file(
    picture: Path, mask: Path | None, arguments: dict[str, Any], order: Order, out: Path, on_step: Any = None
) -> Iterator[Path]:
    """Edit a picture and write each result with its recipe into folder ``out``, and beside it whatever pictures its
    systems drew, yielding the files.

    Raises:
        Everything that :func:`edit` raises, and OSError.
    """
    given = dict(arguments)
    prompts, expected = given.pop("prompt"), given.pop("expected", {})
    model: Any = order.model
    if model is None and expected:
        from sfumato import zoo

        model = expected.get("model")
        if model not in zoo.names():
            raise BadInput(
                f"the edit was made with the model {str(model)[:200]!r}, which is not built in; say --model."
            )
    with files.output_folder(out):
        if model is not None and (order.dtype or order.device != "cpu"):
            model = load(model, dtype=order.dtype, device=order.device)
        done = edit(picture, prompts, mask=mask, model=model, with_=order.with_, on_step=on_step, **given)
        _warn_if_different(expected, done.results[0].model)
        for result, recipe in zip(done.results, done.recipes, strict=True):
            path = files.free_name(out, f"{files.slug(picture.stem)}-{files.slug(result.prompts[0], 40)}")
            yield files.save_png(path, result.images[0], recipe)
            for part in result.parts:
                for name, drawn in (part.pictures(result, 0) if hasattr(part, "pictures") else {}).items():
                    yield files.save_png(path.with_name(f"{path.stem}.{files.slug(name)}.png"), drawn, recipe)


def segment(
    concept: str,
    pictures: Any = None,
    *,
    model: str | Path | Model = DEFAULT_MODEL,
    remover: str | Path | Model | None = None,
    size: tuple[int, int] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Any:
    """From the name of an object to a network that segments it, with no mask drawn.

    Args:
        concept: the object's name, such as ``"ball"``.
        pictures: a folder, files or PIL pictures that show it; None makes ``n`` of them.
        model: knows the object and says roughly where it is.
        remover: redraws pictures without it: an inpainting model; toy-sd-inpaint for toy-sd, else ``model`` itself.
        size: (width, height) to which pictures are cut; by default about the model's own area.
        on_progress: told (stage, done, of how many).
        options: parameters of ``text_to_segmentation`` (``prompt``, ``background``, ``n``, ``iterations`` ...).

    Returns:
        A :class:`sfumato.edit.text_to_segmentation.Segmented`: masks of every stage, ``segmenter``, ``save(folder)``.
    """
    system: Any = cards.method("text_to_segmentation")(**options)
    shown = None if pictures is None else [image for _, image in _listed(pictures)]
    if remover is None:
        remover = INPAINT_MODEL if str(model) == DEFAULT_MODEL else model
    loaded = load(model) if isinstance(model, str | Path) else model
    other = loaded if remover is model else load(remover) if isinstance(remover, str | Path) else remover
    pixels = None
    if shown is not None:
        from sfumato.sampling.request import as_pixels

        size = size or fitting_size(loaded, shown[0].size)
        pixels = as_pixels([files.fitted(image.convert("RGB"), size) for image in shown], None)
    return system.run(loaded, other, concept, pixels, on_progress)


def segment_files(
    what: str,
    pictures: Sequence[Path],
    out: Path,
    model: str | None = None,
    remover: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    on_progress: Callable[[str, int, int], None] | None = None,
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
        return _segmented_by(Path(what), listed, out)
    cards.method("text_to_segmentation")(**{k: v for k, v in options.items() if k != "size"})
    named = {"model": model or DEFAULT_MODEL, "remover": remover or (None if model else INPAINT_MODEL)}
    with files.output_folder(out):
        loaded: dict[str, Any] = {k: load(n, dtype=dtype, device=device) for k, n in named.items() if n is not None}
        images = [image for _, image in listed] or None
        found = segment(what, images, on_progress=on_progress, **loaded, **options)
        return found.save(out, names or None)


def _segmented_by(weights: Path, listed: list[tuple[str, Image]], out: Path) -> list[Path]:
    from PIL import Image as pictures

    from sfumato.edit.text_to_segmentation import Segmenter, as_masks
    from sfumato.sampling.request import as_pixels

    net = Segmenter.load(weights)
    written = []
    with files.output_folder(out):
        for name, image in listed:
            size = net.config.size or image.size
            scale = math.sqrt(size[0] * size[1] / (image.width * image.height))
            pixels = as_pixels(image, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
            [mask] = as_masks(net.masks(pixels))
            mask = mask.resize(image.size, pictures.Resampling.NEAREST)
            written.append(files.save_png(out / f"{name}.png", mask, {"segmenter": weights.name}))
    return written


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
    seen: dict[str, int] = {}
    named = []
    for name, image in found:
        seen[name] = seen.get(name, 0) + 1
        named.append((name if seen[name] == 1 else f"{name}-{seen[name]}", image))
    return named


def judge(folder: str | Path, reference: str | Path | None = None, **options: Any) -> Any:
    """Measures a folder of pictures, against its captions and against a reference folder.

    Returns a :class:`sfumato.judge.report.Report`; arguments, options and errors are those of
    :func:`sfumato.judge.judging.judge_folder` (``prompts``, ``out``, ``metrics``, ``attributes``, ``net``, ...).
    """
    from sfumato.judge.judging import judge_folder

    return judge_folder(folder, reference, **options)


@dataclass
class Side:
    """One side of a comparison: a folder of pictures, or a model with settings to make them with."""

    name: str
    folder: Path | None = None
    model: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    with_: list[Any] = field(default_factory=list)


def side(given: Any) -> Side:
    """A side from a folder, a loaded model, ``dict(model=..., with_=[...], steps=...)``, or text as on the command
    line: a folder of pictures, or ``MODEL`` or ``MODEL:steps=10,guidance=3,with='daam:words=cube'``.

    Raises BadInput for anything else.
    """
    if isinstance(given, Side):
        return given
    if isinstance(given, dict):
        options = dict(given)
        model, with_ = options.pop("model", DEFAULT_MODEL), options.pop("with_", [])
        name = model if isinstance(model, str | Path) else getattr(model, "name", "model")
        settings = ",".join(f"{key}={value}" for key, value in options.items())
        return Side(f"{name}:{settings}" if settings else str(name), None, model, options, _as_list(with_))
    if not isinstance(given, str | Path):
        return Side(getattr(given, "name", "model"), None, given)
    path = Path(given)
    if path.is_dir() and not (path / "model_index.json").is_file():
        return Side(path.name or str(path), path)
    if path.exists() or ":" not in str(given):
        return Side(path.name, None, str(given))
    model, options = cards.parse_with(str(given))
    with_ = _as_list(options.pop("with", []))
    if isinstance(options.get("size"), str):
        options["size"] = options["size"].lower().split("x")
    return Side(str(given), None, model, options, with_)


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def compare(
    first: Any,
    second: Any,
    *,
    prompts: str | Path | Sequence[str] | None = None,
    n: int | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    on_progress: Callable[[int, int, float, str], None] | None = None,
    options: dict[str, Any] | None = None,
    **measuring: Any,
) -> Any:
    """Compares two models, two settings of one model, or two folders, on the same prompts and seeds.

    Args:
        first, second: see :func:`side`. Both folders, or both models.
        prompts: for models: a JSONL file as for ``make --prompts``, or texts. For folders: what the pictures show.
        n, seed: pictures of each prompt and the first one's seed, over what the file says.
        out: folder for the report and, for models, the pictures (``pictures-a``, ``pictures-b``); what is there of them
            is not made again. For models it is needed.
        options: settings for both models, as for :func:`make`; those of a side win.
        on_progress: called with (done, of how many, share of the next, note).
        measuring: ``reference`` and the options of :class:`sfumato.judge.compare.CompareOptions`.

    Returns:
        A :class:`sfumato.judge.report.Report`.

    Raises:
        BadInput: one folder and one model, models without prompts or ``out``, two equal sides, or as
        :func:`sfumato.judge.compare.compare_folders`. Everything that :func:`make` raises.
    """
    from sfumato.judge.compare import compare_folders

    one, two = side(first), side(second)
    names = (one.name, two.name) if one.name != two.name else (f"{one.name} (A)", f"{two.name} (B)")
    measuring = {"names": names, **measuring}

    def measured(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(done, total, 0.0, f"{done}/{total} pairs measured")

    if one.folder and two.folder:
        if n is not None or seed is not None or options:
            raise BadInput("two folders are compared as they are: n, seed and settings of models cannot be given.")
        return compare_folders(one.folder, two.folder, prompts=prompts, out=out, on_progress=measured, **measuring)  # type: ignore[arg-type]
    if one.folder or two.folder:
        raise BadInput(f"{one.name!r} and {two.name!r}: one is a folder and one a model; compare two of a kind.")
    if prompts is None:
        raise BadInput("comparing models needs prompts: a JSONL file, or texts. `sfumato toybox prompts` writes some.")
    if out is None:
        raise BadInput("comparing models needs out, a folder for their pictures.")
    if (str(one.model), one.options, one.with_) == (str(two.model), two.options, two.with_):
        raise BadInput(f"both sides are {one.name!r} with the same settings; change one.")
    out = Path(out)
    sources = [out / "pictures-a", out / "pictures-b"]
    _make_sides([one, two], sources, prompts, {"n": n, "seed": seed, **(options or {})}, dtype, device, on_progress)
    return compare_folders(*sources, out=out, on_progress=measured, **measuring)


def _make_sides(
    sides: list[Side],
    folders: list[Path],
    prompts: str | Path | Sequence[str],
    options: dict[str, Any],
    dtype: str | None,
    device: str,
    on_progress: Callable[[int, int, float, str], None] | None,
) -> None:
    """The pictures of both sides, in turns, so that whatever else the machine does slows both alike."""
    shared = {name: value for name, value in options.items() if value is not None}
    source = Path(prompts) if isinstance(prompts, str | Path) else None
    texts = [] if isinstance(prompts, str | Path) else list(prompts)
    if not source and not texts:
        raise BadInput("prompts is empty; give at least one.")
    total = sum(1 for line in source.open("rb") if line.strip()) if source else len(texts)
    loaded: dict[str, Any] = {}
    runs = []
    for one, folder in zip(sides, folders, strict=True):
        typed = {**shared, **one.options}
        if source:
            lines: Iterable[Line] = read_prompts(source, typed)
        else:
            lines = [Line(i, JobOptions(**{"prompt": text, **typed})) for i, text in enumerate(texts, start=1)]
        build_all(one.with_)
        key = str(one.model)
        if key not in loaded:
            named = isinstance(one.model, str | Path)
            loaded[key] = load(one.model, dtype=dtype, device=device) if named else one.model
        order = Order([], str(one.model), one.with_, dtype, device)
        runs.append(carry_out_lines(lines, order, folder, None, total, loaded[key]))
    wrong: BadLines | None = None
    for done in itertools.count():
        left = len(runs)
        for run in runs if done % 2 == 0 else runs[::-1]:
            try:
                next(run)
            except StopIteration:
                left -= 1
            except BadLines as error:
                wrong, left = error, left - 1
        if not left:
            break
        if on_progress is not None:
            on_progress(done + 1, max(total, done + 1), 0.0, f"{done + 1} pairs made")
    if wrong is not None and not all((folder / "metadata.jsonl").is_file() for folder in folders):
        raise wrong
    if wrong is not None:
        warnings.warn(LinesLeftOut(str(wrong)), stacklevel=3)


class LinesLeftOut(UserWarning):
    """Some lines of a prompts file could not be followed; the comparison goes on with the others."""


def is_picture(what: str) -> bool:
    """Whether a text names a picture file rather than being a prompt."""
    return Path(what).suffix.lower() in PICTURES and (" " not in what or Path(what).is_file())


def _picture_and_prompt(what: str | Path | Image, prompt: str | None) -> tuple[Image, str]:
    if not isinstance(what, str | Path):
        if prompt is None:
            raise BadInput("explaining a picture needs the prompt: what does it show?")
        return what, JobOptions(prompt=prompt).prompt
    image = files.read_picture(what)
    if prompt is None:
        try:
            prompt = str(files.read_recipe(what)[0].get("prompt", ""))
        except BadInput:
            raise BadInput(f"{what} carries no recipe, so say what it shows: --prompt, or prompt=.") from None
    return image, JobOptions(prompt=prompt).prompt


def fitting_size(model: Model, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of about the model's own area in the shape of ``size``, in the steps the model can make."""
    h, w = model.default_size
    scale, step = math.sqrt(w * h / (size[0] * size[1])), model.size_multiple
    width, height = (max(step, round(side * scale / step) * step) for side in size)
    return width, height


def build_all(with_: Any) -> list[Any]:
    """Systems from systems, ``--with`` texts and recipes of systems; a single one is taken as a list of one."""
    given = with_ if isinstance(with_, list | tuple) else [with_]
    return [_built(each) for each in given]


def _built(given: Any) -> Any:
    if isinstance(given, str):
        return cards.build(given)
    return cards.from_recipe(given) if isinstance(given, dict) else given


def models() -> dict[str, dict[str, Any]]:
    """The built-in models: name -> card (summary, sampling defaults, measured quality, recipe). Imports no torch."""
    from sfumato import zoo

    return {name: zoo.card(name) for name in zoo.names()}


def train(
    recipe: str | Path,
    *,
    resume: bool = False,
    minutes: float | None = None,
    out: str | Path | None = None,
    on_progress: Callable[..., Any] | None = None,
) -> Any:
    """Train a recipe (a TOML file, or the name of a shipped one) and export the averaged weights at its end.

    Args:
        resume: go on from the newest sound checkpoint; the losses are those of an uninterrupted run.
        minutes: stop after so much time with a resumable checkpoint.
        out: folder of the exported model.
        on_progress: called with step, steps, logs and seconds after every logged step.

    Raises:
        UnknownName, BadInput: the recipe is not known or not valid. Conflict: its folder holds a run already.
    """
    from sfumato.train.trainer import run

    return run(recipe, resume=resume, minutes=minutes, out=None if out is None else Path(out), on_progress=on_progress)


def teach(
    by: str,
    model: str | Path | Any,
    data: str | Path = "toybox",
    *,
    per_class: int = 3,
    seed: int = 0,
    out: str | Path | None = None,
    on_progress: Callable[..., None] | None = None,
) -> Any:
    """Teach a classifier better habits from a few masked pictures, by a system such as ``robust_vit``.

    Args:
        by: the system, as for ``--with`` (``"robust_vit:lr=3e-5,epochs=30"``).
        model: a built-in name, a transformers folder, or a :class:`~sfumato.models.readers.Reader`; it is not changed.
        data: an imagefolder whose ``metadata.jsonl`` names ``file_name``, ``mask`` and ``label``, or "toybox": pictures
            whose backdrop gives the shape away, ``per_class`` of each drawn by ``seed``.
        out: a new folder for the taught model.
        on_progress: called with epoch, epochs and what is logged.

    Returns the system's record; its ``model`` is the taught copy. Raises BadInput, UnknownName, NotSupported.
    """
    from sfumato.models.readers import load_reader
    from sfumato.teach.examples import read_examples, toybox_examples

    key, params = cards.parse_with(by)
    system = cards.method(key)(**params)
    work = getattr(importlib.import_module(type(system).__module__), "teach", None)
    if work is None or type(system).CARD.verb != "teach":  # type: ignore[attr-defined]
        raise UnknownName("system that teaches", key, cards.methods("teach"))
    reader = load_reader(model) if isinstance(model, str | Path) else model
    if reader.kind != "classifier" or reader.size is None:
        raise NotSupported(f"{key} teaches classifiers of pictures; {reader.name} is none.")
    if str(data) == "toybox":
        examples, held = toybox_examples(per_class, seed), toybox_examples(per_class, seed, "val")
        validation = (reader.pixels(held.pictures), held.masks, held.labels)
    else:
        examples, validation = read_examples(data, reader.size), None
    given = system.params.model_dump()
    pixels = reader.pixels(examples.pictures)
    found = work(
        reader.module, pixels, examples.masks, examples.labels, validation=validation, on_progress=on_progress, **given
    )
    found.facts |= {"model": reader.name, "data": str(data), "labels": list(examples.labels)}
    if out is not None:
        found.save(out)
    return found


# --- pictures on disk ------------------------------------------------------------------------------------------------


@dataclass
class Order:
    """Pictures to make and write: one entry of ``jobs`` per prompt, with one model and the same systems for all.

    ``expected`` is the recipe that a picture to be repeated carries, to warn where model or versions differ from it.
    ``maps``: also write the numbers behind the pictures that systems draw.
    """

    jobs: list[JobOptions]
    model: str | None = None
    with_: list[Any] = field(default_factory=list)
    dtype: str | None = None
    device: str = "cpu"
    image: Path | None = None
    expected: dict[str, Any] = field(default_factory=dict)
    maps: bool = False

    def pictures(self) -> list[JobOptions]:
        """The jobs spelt out: one entry, with one seed, per picture."""
        return [job.model_copy(update={"n": 1, "seed": job.seed + i}) for job in self.jobs for i in range(job.n)]


def like(picture: Path, typed: dict[str, Any], order: Order) -> Order:
    """``order`` completed by the recipe in ``picture``; what was typed, there or in ``order``, wins.

    The recipe is a stranger's: it may name built-in models only, and every value is checked as if typed.
    """
    from sfumato import zoo

    recipe, exact = files.read_recipe(picture)
    if recipe.get("edit") is not None:
        raise BadInput(f"{picture} is an edit; repeat it from its original: sfumato edit ORIGINAL --like {picture}.")
    known = {name: recipe[name] for name in JobOptions.model_fields if recipe.get(name) is not None and name != "n"}
    if recipe.get("latents") is not None:
        raise BadInput(f"{picture} was made from latents that a program gave; only that program can repeat it.")
    if (recipe.get("image") is None) != (order.image is None):
        raise BadInput(
            f"{picture} was made {'without' if order.image else 'from'} a picture: --image must agree with that."
        )
    try:
        job = JobOptions(**{**known, **typed})
        with_ = order.with_ or recipe.get("with") or []
        if not (isinstance(with_, list) and all(isinstance(each, str | dict) for each in with_)):
            raise BadInput("its list of systems is damaged.")
        build_all(with_)
    except SfumatoError as error:
        raise BadInput(f"the recipe in {picture} cannot be followed: {error}") from None
    model = order.model or recipe.get("model")
    if exact and not order.model and model not in zoo.names():
        raise BadInput(
            f"{picture} was made with the model {str(model)[:200]!r}, which is not built in; "
            "say --model yourself to load it, or another one."
        )
    if not exact:
        told = "its settings come from another program's text, so the picture will not be the same"
        warnings.warn(RecipeDiffers(f"{picture}: {told}."), stacklevel=2)
    dtype = order.dtype or (str(recipe["dtype"]) if exact and recipe.get("dtype") else None)
    return replace(order, jobs=[job], model=model, with_=with_, dtype=dtype, expected=recipe if exact else {})


class RecipeDiffers(UserWarning):
    """A picture that is to be repeated was made by other weights or versions, so it may come out differently."""


def carry_out(
    order: Order, out: Path, on_step: Callable[[int, int, float], None] | None = None
) -> Iterator[list[Path]]:
    """Make the pictures of ``order`` one by one in folder ``out``, yielding the files of each as soon as it is whole.

    One by one, so that each file is the same however many are made with it, and an interruption keeps what is finished.
    ``on_step`` hears (picture, of so many, share of it done).

    Raises:
        BadInput: ``out`` is a file. OSError: it cannot be written. Everything that :func:`make` raises.
    """
    pictures = order.pictures()
    build_all(order.with_)  # misspelt systems are told before the model is loaded
    image = None if order.image is None else files.read_picture(order.image)
    with files.output_folder(out):
        model = load(order.model or DEFAULT_MODEL, dtype=order.dtype, device=order.device)
        _warn_if_different(order.expected, model)
        from sfumato.sampling import generate

        for index, options in enumerate(pictures):

            def heard(step: Any, index: int = index) -> None:
                if on_step is not None:
                    on_step(index, len(pictures), (step.i + 1) / step.total)

            systems = build_all(order.with_)
            result = generate(model, **options.arguments(), image=image, interventions=systems, on_step=heard)
            yield write(result, out, order.maps)


def write(result: Result, out: Path, maps: bool = False, at: Path | None = None) -> list[Path]:
    """Write each picture of ``result`` with its recipe, and beside it whatever pictures its systems drew.

    ``maps``: also the numbers behind these, as ``.safetensors``. ``at``: where the only picture of ``result`` goes.
    """
    written = []
    for index, image in enumerate(result.images):
        recipe = result.recipes[index]
        path = at or files.free_name(out, f"{files.slug(result.prompts[index])}-{result.seeds[index]}")
        written.append(files.save_png(path, image, recipe))
        for part in result.parts:
            drawn = part.pictures(result, index) if hasattr(part, "pictures") else {}
            for name, picture in drawn.items():
                written.append(files.save_png(path.with_name(f"{path.stem}.{files.slug(name)}.png"), picture, recipe))
            if maps and hasattr(part, "maps"):
                written.append(part.maps[index].save(path.with_name(f"{path.stem}.{part.name}.safetensors")))
    return written


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
        image, prompt = _picture_and_prompt(picture, prompt)
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


def _warn_if_different(expected: dict[str, Any], model: Model) -> None:
    """Say so when the picture to be repeated was made by other weights or versions than are here."""
    if not expected:
        return
    if expected.get("hash") != model.weight_hash:
        then = str(expected.get("hash"))[:10]
        told = f"other weights of {model.name} here ({model.weight_hash[:10]}) than then ({then})"
        warnings.warn(RecipeDiffers(f"{told}: the picture will differ."), stacklevel=2)
    versions = expected.get("versions")
    for name in ("torch", "diffusers", "transformers"):
        then = str(versions.get(name))[:20] if isinstance(versions, dict) else "unknown"
        if then != metadata.version(name):
            told = f"{name} is {metadata.version(name)} here and was {then} then"
            warnings.warn(RecipeDiffers(f"{told}: the picture may differ in small ways."), stacklevel=2)


ANNOTATIONS = ("task", "tag", "include", "exclude", "id")  # what a prompt set says besides how to make the picture


@dataclass(frozen=True)
class Line:
    """One line of a prompts file: its number, what to make, and what else it says; or what is wrong with it."""

    number: int
    job: JobOptions | None
    about: dict[str, Any] = field(default_factory=dict)
    wrong: str = ""


def read_prompts(path: Path, typed: dict[str, Any]) -> Iterator[Line]:
    """The lines of a JSONL file, one by one: a JSON object each with the keys of :class:`JobOptions` (and
    :data:`ANNOTATIONS`); what was ``typed`` wins.

    Raises:
        BadInput: the file is not text, or has no line. OSError: it cannot be read.
    """
    any_line = False
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    any_line = True
                    yield _line(number, line, typed)
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not UTF-8 text.") from None
    if not any_line:
        raise BadInput(f"{path} holds no prompts.")


def _line(number: int, text: str, typed: dict[str, Any]) -> Line:
    try:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ValueError("not an object")
        about = {name: given.pop(name) for name in ANNOTATIONS if name in given}
        return Line(number, JobOptions(**{**given, **typed}), about)
    except SfumatoError as error:
        return Line(number, None, wrong=str(error))
    except (ValueError, RecursionError):
        example = '{"prompt": "a red cube", "seed": 1}'
        return Line(number, None, wrong=f"not a JSON object; write lines such as {example}.")


@dataclass(frozen=True)
class Made:
    """A picture of a long list: its files, and whether it was there already. ``seconds`` and ``cost`` when made now."""

    paths: list[Path]
    there: bool = False
    seconds: float = 0.0
    cost: float = 0.0


class BadLines(BadInput):
    """Some lines of a prompts file could not be followed; all others were."""


def carry_out_lines(
    lines: Iterable[Line],
    order: Order,
    out: Path,
    on_step: Callable[[int, int, float], None] | None = None,
    total: int = 0,
    model: Model | None = None,
    ray: bool = False,
    workers: int | None = None,
) -> Iterator[Made]:
    """Make the pictures of a prompts file one by one in folder ``out``, which keeps ``metadata.jsonl`` of them.

    What that file says is done is not made again; so the same call goes on after a kill. Lines that cannot be followed
    are told at the end, when all others are done. ``ray``: pictures are made on so many ``workers``
    (:mod:`sfumato.scale`); files, their order and their content are the same.

    Raises:
        BadLines: some could not be followed. Everything that :func:`carry_out` raises that concerns all lines.
    """
    build_all(order.with_)
    image = None if order.image is None else files.read_picture(order.image)
    wrong: list[str] = []
    tally = {"lines": 0, "done": 0}

    def jobs() -> Iterator[tuple[int, Line, JobOptions]]:
        """(index, line, one picture of it), for every line that can be followed."""
        for index, line in enumerate(lines):
            tally["lines"] += 1
            if line.job is None:
                wrong.append(f"line {line.number}: {line.wrong}")
                continue
            for i in range(line.job.n):
                yield index, line, line.job.model_copy(update={"n": 1, "seed": line.job.seed + i})

    with files.output_folder(out), contextlib.ExitStack() as stack:
        made = (
            _spread_lines(jobs(), order, image, out, workers, stack)
            if ray
            else _make_lines(jobs(), order, image, out, model, on_step, total)
        )
        failed = -1
        for index, line, answer in made:
            if isinstance(answer, str):
                if line.number != failed:
                    wrong.append(f"line {line.number}: {answer}")
                failed = line.number
            elif line.number != failed:
                tally["done"] += 1
                if ray and on_step is not None:
                    on_step(index, max(total, index + 1), 1.0)
                yield answer() if callable(answer) else answer
    count, done = tally["lines"], tally["done"]
    if wrong:
        named = " ".join(wrong[:3]) + (f" And {len(wrong) - 3} more." if len(wrong) > 3 else "")
        kept = f" The {done} pictures of the others are in {out}." if done else ""
        raise BadLines(f"{len(wrong)} of {count} lines could not be followed: {named}{kept}")


Answer = tuple[int, Line, Any]
"""Index, line, and the :class:`Made` (or a call that writes it), or in words why it could not be."""


def _make_lines(
    jobs: Iterator[tuple[int, Line, JobOptions]],
    order: Order,
    image: Image | None,
    out: Path,
    model: Model | None,
    on_step: Callable[[int, int, float], None] | None,
    total: int,
) -> Iterator[Answer]:
    """Pictures one after the other, in this process."""
    from sfumato.judge.journal import Journal

    journal: Journal | None = None
    failed = -1
    for index, line, options in jobs:
        if line.number == failed:
            continue
        if model is None:  # only now: a file of nothing but damage needs none
            model = load(order.model or DEFAULT_MODEL, dtype=order.dtype, device=order.device)
        journal = journal or Journal(out)

        def heard(step: Any, index: int = index) -> None:
            if on_step is not None:
                on_step(index, max(total, index + 1), (step.i + 1) / step.total)

        try:
            key = _job_key(options, order, image, model.weight_hash, str(model.dtype))
            there = journal.take(key)
            if there is not None:
                yield index, line, Made([there], there=True)
                continue
            result, seconds = _timed(model, options, order, image, heard)
            path = journal.begin(key, _stem(options), _row(options, line.about, seconds, result.cost))
            made = Made(write(result, out, order.maps, path), False, seconds, result.cost)
        except SfumatoError as error:
            if isinstance(error, WorkInterrupted):
                raise
            failed = line.number
            yield index, line, str(error)
            continue
        yield index, line, made


def _spread_lines(
    jobs: Iterator[tuple[int, Line, JobOptions]],
    order: Order,
    image: Image | None,
    out: Path,
    workers: int | None,
    stack: contextlib.ExitStack,
) -> Iterator[Answer]:
    """The same on Ray workers. They make pictures; names, journal and files are this process's alone."""
    from sfumato.judge.journal import Journal
    from sfumato.scale import Workers

    first = next(jobs, None)
    if first is None:
        return
    journal = Journal(out)
    pool = stack.enter_context(Workers(functools.partial(_Maker, order, image), workers))
    weight_hash, dtype = pool.ask(None)

    def items() -> Iterator[tuple[Any, Any]]:
        for index, line, options in itertools.chain([first], jobs):
            key = _job_key(options, order, image, weight_hash, dtype)
            there = journal.take(key)
            yield (index, line, options, key, there), None if there is not None else options

    for (index, line, options, key, there), answer in pool.map(items()):
        if there is not None or isinstance(answer, str):
            yield index, line, Made([there], there=True) if there is not None else answer
            continue

        def put(options: JobOptions = options, line: Line = line, key: str = key, answer: Any = answer) -> Made:
            parts, seconds, cost = answer
            path = journal.begin(key, _stem(options), _row(options, line.about, seconds, cost))
            written = []
            for suffix, content in parts:  # what is drawn beside a picture carries its name
                written.append(path.with_name(path.stem + suffix))
                with files.replacing(written[-1]) as file:
                    file.write(content)
            return Made(written, False, seconds, cost)

        yield index, line, put


class _Maker:
    """On a worker: options of one picture -> its files as (end of the name, bytes), seconds, cost; or what is wrong."""

    def __init__(self, order: Order, image: Image | None):
        self.order, self.image = order, image
        self.model = load(order.model or DEFAULT_MODEL, dtype=order.dtype, device=order.device)

    def __call__(self, options: JobOptions | None) -> Any:
        import tempfile

        if options is None:
            return self.model.weight_hash, str(self.model.dtype)
        try:
            result, seconds = _timed(self.model, options, self.order, self.image, None)
        except SfumatoError as error:
            return str(error)
        with tempfile.TemporaryDirectory() as folder:
            paths = write(result, Path(folder), self.order.maps, Path(folder) / "picture.png")
            return [(path.name[len("picture") :], path.read_bytes()) for path in paths], seconds, result.cost


def _timed(
    model: Model, options: JobOptions, order: Order, image: Image | None, heard: Callable[[Any], None] | None
) -> tuple[Result, float]:
    """One picture, decoded within the seconds that are told."""
    from sfumato.sampling import generate

    start = time.perf_counter()
    systems = build_all(order.with_)
    result = generate(model, **options.arguments(), image=image, interventions=systems, on_step=heard)
    result.images  # noqa: B018
    return result, time.perf_counter() - start


def _job_key(options: JobOptions, order: Order, image: Image | None, weight_hash: str, dtype: str) -> str:
    """By what a picture that is there already is known."""
    what: list[Any] = [options.model_dump(mode="json"), [cards.to_recipe(each) for each in build_all(order.with_)]]
    what += [weight_hash, dtype, None if image is None else hashlib.sha256(image.tobytes()).hexdigest()]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _stem(options: JobOptions) -> str:
    return f"{files.slug(options.prompt)}-{options.seed}"


def _row(options: JobOptions, about: dict[str, Any], seconds: float, cost: float) -> dict[str, Any]:
    return {"text": options.prompt, "seed": options.seed, "seconds": round(seconds, 4), "cost": cost, **about}
