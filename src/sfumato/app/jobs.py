"""What to make, as one set of checked options, and the calls from Python that make it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from sfumato import cards, checkpoints, writing
from sfumato.app.pictures import fitted_to
from sfumato.cards import Field
from sfumato.cards.signatures import with_signature
from sfumato.errors import BadInput
from sfumato.sampling.arguments import GenerateArguments
from sfumato.sampling.options import Options
from sfumato.startup import collector_paused

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from typing_extensions import Unpack

    from sfumato.models import Model
    from sfumato.sampling import Result


DEFAULT_MODEL = "toy-sd"
PICTURES = writing.PICTURES
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
    return load_found(found, name, dtype, device, config)


def load_found(
    found: checkpoints.Checkpoint,
    name: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    config: str | Path | None = None,
    jobs: Sequence[MakeOptions | JobOptions] = (),
) -> Model:
    """:func:`load` of a checkpoint that was looked up, for these ``jobs``. Raises OutOfMemory, before anything is
    loaded, for sizes that surely do not fit into memory with it."""
    sizes = {job.size for job in jobs if job.size is not None}
    if sizes:
        from sfumato.models.memory import refuse_unaffordable_at

        for size in sizes:
            refuse_unaffordable_at(found.path, size, 1, 2 if "16" in str(dtype) else 4, device)
    with collector_paused():
        from sfumato.models import load as load_model

        return load_model(name, dtype=dtype, device=device, config=config, found=found)


@with_signature(GenerateArguments, cards.parameters_of(MakeOptions))
def make(
    prompt: str | Sequence[str],
    *,
    model: str | Path | Model = DEFAULT_MODEL,
    with_: Any = (),
    allow: Sequence[str | Path] = (),
    image: Any = None,
    reference: Any = None,
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
        reference: a picture, or several, to draw by, with models that look at pictures beside the prompt (Kontext,
            Flux.2, Qwen-Image-Edit). Without ``size`` and ``image`` the first one says the shape.
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

    loaded = (
        model if not isinstance(model, str | Path) else load_found(checkpoints.find(str(model)), model, jobs=[checked])
    )
    given = checked.arguments() | fitted_to(loaded, reference if image is None else image, checked.size)
    return generate(loaded, **given, image=image, reference=reference, interventions=systems, on_step=on_step)


def offers(model: str | Path | Model, needs: Sequence[str]) -> bool:
    """Whether a model, loaded or not, has these capabilities; False where only loading will tell."""
    if not isinstance(model, str | Path):
        return all(model.family.has(each) for each in needs)
    from sfumato.models import family_at

    family = family_at(model)
    return family is not None and family.capabilities.issuperset(needs)


def suitable_model(needs: Sequence[str]) -> str:
    """The built-in model to use by default: the package's default, or the first that has these capabilities."""
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
