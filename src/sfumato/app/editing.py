"""Edits of pictures: of sfumato's own by playing their recipe again, of any other by inversion or inpainting."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from sfumato import cards, files
from sfumato.app.jobs import (
    DEFAULT_MODEL,
    INPAINT_MODEL,
    JobOptions,
    Order,
    RecipeDiffers,
    build_all,
    fitting_size,
    like,
    load,
    readable,
    warn_if_different,
)
from sfumato.cards import Field, Params
from sfumato.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

    from sfumato.models import Model
    from sfumato.sampling import Result


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
    def readable(cls, given: Any) -> Any:
        return given if given is None else readable(given)

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
    warn_if_different(order.expected, loaded)
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
        from sfumato import registry

        model = expected.get("model")
        if model not in registry.names():
            raise BadInput(
                f"the edit was made with the model {str(model)[:200]!r}, which is not built in; say --model."
            )
    with files.output_folder(out):
        if model is not None and (order.dtype or order.device != "cpu"):
            model = load(model, dtype=order.dtype, device=order.device)
        done = edit(picture, prompts, mask=mask, model=model, with_=order.with_, on_step=on_step, **given)
        warn_if_different(expected, done.results[0].model)
        for result, recipe in zip(done.results, done.recipes, strict=True):
            path = files.free_name(out, f"{files.slug(picture.stem)}-{files.slug(result.prompts[0], 40)}")
            yield files.save_png(path, result.images[0], recipe)
            for part in result.parts:
                for name, drawn in (part.pictures(result, 0) if hasattr(part, "pictures") else {}).items():
                    yield files.save_png(path.with_name(f"{path.stem}.{files.slug(name)}.png"), drawn, recipe)
