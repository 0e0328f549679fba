"""Edits of pictures that exist: what a picture is and shows, and which system edits it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from sfumato import cards, files, markup, protocol, writing
from sfumato.app.arguments import EditArguments
from sfumato.app.batch import JobBatch, RecipeDiffers, check_weights, like, model_of
from sfumato.app.jobs import DEFAULT_MODEL, JobOptions, build_all, load, offers, readable, suitable_model
from sfumato.app.pictures import fitting_size
from sfumato.cards import Field, Params
from sfumato.cards.signatures import with_signature
from sfumato.errors import BadInput, NotSupported

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from typing_extensions import Unpack

    from sfumato.models import Model
    from sfumato.sampling import Result


class EditOptions(Params):
    """What can be said about an edit, besides the model and the parameters of the systems; a system takes those that
    its ``OPENING`` names (:class:`sfumato.protocol.Edits`)."""

    SYSTEM = "edit"

    prompt: list[str] = Field(min_length=1, description="what the edited pictures show")
    from_: str | None = Field(default=None, description="what the picture shows now; none: the prompt in it")
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
    seed: int | None = Field(
        default=None, ge=0, lt=2**62, description="regions drawn anew: where the noise comes from, 0"
    )
    scheduler: str | None = Field(default=None, description="regions drawn anew: who steps, such as ddim")
    strength: float | None = Field(
        default=None, ge=0, le=1, description="regions drawn anew: how much of the schedule, as in make; 1 if not said"
    )

    @field_validator("prompt", "from_")
    @classmethod
    def readable(cls, given: Any) -> Any:
        return given if given is None else readable(given)

    def opening(self) -> dict[str, Any]:
        """How to open the picture, as far as it was said."""
        names = ("steps", "guidance", "size", "inner", "refine", "seed", "scheduler", "strength")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, eq=False)
class EditResult:
    """What :func:`edit` made: one result per new prompt, and the opened ``original``, which further edits can be given
    in place of the picture (where a region was drawn anew: the picture itself, as it was cut)."""

    original: Any
    results: list[Result]
    recipes: list[dict[str, Any]]

    @property
    def images(self) -> list[Image]:
        """The edited pictures."""
        return [result.images[0] for result in self.results]

    def _repr_html_(self) -> str:
        shown = [(each.prompts[0], image) for each, image in zip(self.results, self.images, strict=True)]
        return markup.gallery(repr(self), shown)

    def __repr__(self) -> str:
        return f"EditResult({len(self.results)} pictures: {', '.join(repr(each.prompts[0]) for each in self.results)})"


@dataclass(frozen=True)
class Editor:
    """The system that edits, with its parameters, and what takes part beside it. ``plain``: another system that takes
    part does the editing, so the picture is only drawn again with it."""

    cls: Any
    params: dict[str, Any]
    others: list[Any]
    plain: bool = False

    @property
    def key(self) -> str:
        return self.cls.CARD.key


@with_signature(EditArguments, cards.parameters_of(EditOptions), cards.parameters(cards.default("edit")))
def edit(
    image: str | Path | Image | Any,
    prompt: str | Sequence[str],
    *,
    from_: str | None = None,
    mask: Any = None,
    model: str | Path | Model | None = None,
    by: str | None = None,
    with_: Any = (),
    allow: Sequence[str | Path] = (),
    on_step: Callable[..., Any] | None = None,
    **options: Unpack[EditArguments],
) -> EditResult:
    """Change what a picture shows by its prompt, and keep the rest of it.

    Args:
        image: a PNG made by sfumato, which is drawn again from its own noise; any other picture (path or PIL), which is
            inverted and needs ``from_``; or the ``original`` of earlier edits, whose further edits cost their own rows.
        prompt: what the edited picture shows; several make several pictures.
        from_: what the picture shows now.
        mask: white where the picture may change, as a file, picture, array or tensor; everything else is kept.
        model: by default the one in the recipe, else toy-sd, or one that the system runs on.
        by: the system that edits, as for ``--with``. By default one among ``with_``, or the one whose card says so
            (with a mask and an inpainting model another one: the region is then drawn anew without regard to what was
            there, and nothing is inverted).
        with_: systems that take part. With one of the verb edit that only takes part, and no parameters of an editing
            system, that one edits alone.
        allow: files, or folders of files, that systems in a picture's recipe may open (:func:`.cards.refuse_files`).
        options: parameters of the editing system (``sfumato methods KEY``), and those of :class:`EditOptions` that it
            takes: ``steps``, ``guidance``, ``size``, ``seed``, ``scheduler``, ``strength``, ``inner``, ``refine``,
            ``invert``. What a system calls strength itself is said within it: ``KEY:strength=0.5``.

    Raises:
        BadInput: no recipe and no ``from_``, or an option is out of its range. NoMatch: a word is in neither prompt.
    """
    if by is not None and not _edits(cards.method(cards.parse_with(by)[0])):
        raise NotSupported(f"{by} edits no pictures by itself; give it as with_, or --with.")
    systems = [*([by] if by else []), *(with_ if isinstance(with_, list | tuple) else [with_])]
    cards.refuse_files([each for each in systems if isinstance(each, dict)], allow)
    given: dict[str, Any] = {**options}
    general = {name: given.pop(name) for name in list(given) if name in EditOptions.model_fields}
    editor = _editor(systems, {k: v for k, v in given.items() if v is not None}, model, mask)
    if "from_" in editor.cls.OPENING:
        from_ = editor.params.pop("source", None) if from_ is None else from_
        editor.params.pop("source", None)
    checked = EditOptions(prompt=[prompt] if isinstance(prompt, str) else list(prompt), from_=from_, **general)
    _refuse_foreign(editor, checked)
    editor.cls.Params(**editor.params)  # misspelt parameters are refused before anything heavy is loaded
    build_all(editor.others, allow)
    if mask is not None and editor.params.get("mask"):
        raise BadInput(f"the mask is given twice: as mask, and within {editor.key}.")
    whole = None if mask is None else _mask(mask)
    opened: Any
    if hasattr(image, "edit"):
        if checked.opening() or from_ is not None:
            raise BadInput(
                "an opened original is edited as it was opened; only its prompt, mask and systems can be set."
            )
        opened, about = image, dict(getattr(image, "facts", {}).get("about", {}))
    else:
        opened, about = _open(image, checked, editor, whole, model, allow, on_step)
    results: list[Result] = []
    recipes: list[dict[str, Any]] = []
    for text in checked.prompt:
        added: dict[str, Any] = {"with_": build_all(editor.others, allow), "on_step": on_step}
        added |= {} if whole is None else {"mask": whole}
        result = opened.redraw(text, **added) if editor.plain else opened.edit(text, **{**editor.params, **added})
        edited = [] if editor.plain else [next(part for part in result.parts if isinstance(part, editor.cls))]
        about["mask"] = None if whole is None else files.pixel_hash(whole)
        about["with"] = [_recipe_of(each) for each in (*edited, *build_all(editor.others, allow))]
        if edited and whole is not None:  # it is given beside the recipe
            about["with"][0]["params"].pop("mask", None)
        results.append(result)
        recipes.append({**result.recipe, "edit": dict(about)})
    return EditResult(getattr(opened, "original", opened), results, recipes)


def _editor(systems: Sequence[Any], params: dict[str, Any], model: Any, mask: Any) -> Editor:
    """The system that edits among those given, or the default one."""
    named = [_named(each) for each in systems]
    editing = [i for i, (key, _) in enumerate(named) if key and _edits(cards.method(key))]
    if editing:
        key, cls = named[editing[0]][0], cards.method(named[editing[0]][0])
        mine = [i for i in editing if named[i][0] == key]
        given = {name: value for i in mine for name, value in named[i][1].items() if value is not None}
        return Editor(cls, {**given, **params}, [each for i, each in enumerate(systems) if i not in mine])
    masked = cards.default("edit mask")
    if mask is not None and model is not None and offers(model, cards.methods()[masked].needs):
        return Editor(cards.method(masked), params, list(systems))
    alone = not params and any(key in cards.methods("edit") for key, _ in named)
    return Editor(cards.method(cards.default("edit")), params, list(systems), plain=alone)


def _edits(cls: Any) -> bool:
    return "edit" in protocol.serves(cls)


def _refuse_foreign(editor: Editor, options: EditOptions) -> None:
    """Raises BadInput for options that the system which edits does not take."""
    for name in EditOptions.model_fields:
        if name != "prompt" and getattr(options, name) not in (None, False) and name not in editor.cls.OPENING:
            takes = ", ".join(each.rstrip("_") for each in editor.cls.OPENING)
            own = name in editor.cls.Params.model_fields
            said = f"; for its own {name} write {editor.key}:{name}=..." if own else ""
            raise BadInput(
                f"{name.rstrip('_')} cannot be given to {editor.key}; it takes {takes} and its parameters{said}."
            )


def _open(
    image: Any,
    options: EditOptions,
    editor: Editor,
    mask: Image | None,
    model: Any,
    allow: Sequence[str | Path],
    on_step: Any,
) -> tuple[Any, dict[str, Any]]:
    """A picture opened for editing, and what a recipe says about that."""
    path = Path(image) if isinstance(image, str | Path) else None
    picture = files.read_picture(path) if path is not None else image
    if mask is not None and mask.size != picture.size:
        sizes = f"{mask.width}x{mask.height}, but the picture is {picture.width}x{picture.height}"
        raise BadInput(f"the mask is {sizes}; they must agree.")
    about = {
        "picture": path.name if path is not None else None,
        "pixels": files.pixel_hash(picture),
        "from": options.from_,
        "invert": options.invert,
        "options": {name: list(v) if isinstance(v, tuple) else v for name, v in options.opening().items()},
    }
    recipe: dict[str, Any] = {}
    exact = False
    if path is not None and "from_" in editor.cls.OPENING:
        try:
            recipe, exact = files.read_recipe(path)
        except BadInput:
            pass
    exact = exact and not hasattr(editor.cls, "load_model")  # others draw nothing again
    fresh = all(recipe.get(name) is None for name in ("edit", "image", "latents", "reference"))
    if path is not None and exact and fresh and not options.invert:
        opened = _replayed(path, picture, options, editor, model, allow, on_step)
    else:
        shown = options.from_ or (str(recipe["prompt"]) if recipe.get("prompt") else None)
        if shown is None and "from_" in editor.cls.OPENING:
            what = f"{path} carries" if path is not None else "the picture carries"
            raise BadInput(f"{what} no recipe, so say what it shows now: --from, or from_=.")
        shown = None if shown is None else JobOptions(prompt=shown).prompt
        system = _built(editor, shown)
        opening = options.opening()
        if hasattr(editor.cls, "load_model"):
            loaded = editor.cls.load_model(model) if isinstance(model, str | Path | None) else model
        else:
            if model is None:
                model = suitable_model(editor.cls.CARD.needs)
            loaded = load(model) if isinstance(model, str | Path) else model
            opening = {"size": fitting_size(loaded, picture.size), **opening}
        opened = system.open(loaded, protocol.Picture(picture, shown), on_step, **opening)
    if hasattr(opened, "facts"):
        opened.facts["about"] = about
    return opened, about


def _replayed(
    path: Path,
    picture: Image,
    options: EditOptions,
    editor: Editor,
    model: Any,
    allow: Sequence[str | Path],
    on_step: Any,
) -> protocol.Opened:
    """A picture of ours opened by its recipe."""
    if options.opening():
        names = " and ".join(options.opening())
        raise BadInput(f"{names} cannot be given for {path}, which is drawn again by its recipe; or add invert.")
    named = str(model) if isinstance(model, str | Path) else getattr(model, "name", None)
    batch = like(path, {}, JobBatch([], named, allow=list(allow)))
    shown = batch.jobs[0].prompt
    if options.from_ is not None and options.from_ != shown:
        raise BadInput(f"from is {options.from_!r}, but {path} says that it shows {shown!r}; or add invert.")
    system = _built(editor, shown)
    loaded = load(batch.model or DEFAULT_MODEL, dtype=batch.dtype) if isinstance(model, str | Path | None) else model
    check_weights(batch.expected, loaded, batch.same_weights)
    settings = batch.jobs[0].arguments() | {"n": 1}
    opened = system.open(loaded, protocol.Picture(picture, shown, settings, batch.systems()), on_step)
    if opened.fidelity < 60:  # rounding to 8 bits alone leaves equal pictures
        why = "its recipe makes another picture here" if opened.fidelity else "it was cut or resized"
        warnings.warn(
            RecipeDiffers(f"{path}: {why}, and that one is edited; --invert edits the picture in the file."),
            stacklevel=3,
        )
    return opened


def _built(editor: Editor, shown: str | None) -> Any:
    """The system that edits, to open a picture with."""
    params = {} if editor.plain else editor.params
    return editor.cls(**params, **({"source": shown} if "from_" in editor.cls.OPENING else {}))


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


def _recipe_of(system: Any) -> dict[str, Any]:
    return cards.to_recipe(system) if hasattr(system, "CARD") else {"method": system.name, "params": {}}


def edit_like(picture: Path, image: Path, mask: Path | None, allow: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Arguments of :func:`edit` that make the edit ``picture`` again from its original ``image`` (and ``mask``).

    Raises:
        NotAllowed: a system in the recipe opens a file that ``allow`` does not name.
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
    cards.refuse_files(with_, allow, f"the recipe in {picture}")
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
    picture: Path, mask: Path | None, arguments: dict[str, Any], batch: JobBatch, out: Path, on_step: Any = None
) -> Iterator[Path]:
    """Edit a picture and write each result with its recipe into ``out``, a folder or the name of a
    file, and beside it whatever pictures its
    systems drew, yielding the files.

    Raises:
        Everything that :func:`edit` raises, and OSError.
    """
    given = dict(arguments)
    prompts, expected = given.pop("prompt"), given.pop("expected", {})
    model: Any = batch.model
    same = model is None and bool(expected)
    if same:
        model = model_of(expected, Path("the edit"), beside=picture)
    with writing.output(out) as (folder, named):
        if model is not None and (batch.dtype or batch.device != "cpu" or batch.config):
            model = batch.load(model)
        systems, allow = batch.with_, batch.allow
        done = edit(picture, prompts, mask=mask, model=model, with_=systems, allow=allow, on_step=on_step, **given)
        check_weights(expected, done.results[0].model, same)
        for index, (result, recipe) in enumerate(zip(done.results, done.recipes, strict=True)):

            def save(path: Path, new: bool, image: Any = result.images[0], recipe: Any = recipe) -> Path:
                return files.save_png(path, image, recipe, new)

            stem = f"{writing.slug(picture.stem)}-{writing.slug(result.prompts[0], 40)}"
            at = writing.numbered(named, index, len(done.results))
            path = writing.create(folder, stem, ".png", save, at)
            yield path
            for part in result.parts:
                for name, drawn in (part.pictures(result, 0) if hasattr(part, "pictures") else {}).items():
                    yield files.save_png(path.with_name(f"{path.stem}.{writing.slug(name)}.png"), drawn, recipe)
