"""What every system promises, as checks that take a way to make the system and a model.

``make()`` returns a fresh system; the prompt is always :data:`PROMPT`. ``test_contract.py`` and ``test_composition.py``
apply the checks to every registered system; ``test_checks.py`` shows that each fails for a system that breaks its word.
What a system gives alone is needed again and again: it is worked out once (:func:`alone`). That it would be the same
every time is checked too (:func:`check_deterministic`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sfumato.attention import Call
from sfumato.cards import CAPABILITIES, from_recipe, to_recipe
from sfumato.cards.paths import opens
from sfumato.errors import Conflict, NoMatch, NotSupported, SfumatoError, WorkInterrupted
from sfumato.models import Model
from sfumato.models.families import families_with
from sfumato.sampling import Guidance, Intervention, Result, Step, generate, recipe_args
from tests.helpers import fingerprint
from tests.tiny import forget_pipelines

PROMPT = "a red cube and a blue ball"
OTHER_PROMPT = "a green cone, a red cube and a blue ball on the grass"
STEPS, SEED = 2, 5

Make = Callable[[], Intervention]


def run(model: Model, systems: Any = (), prompt: Any = PROMPT, **options: Any) -> Result:
    given = {"steps": STEPS, "guidance": 3.0, "seed": SEED, "decode": False, **options}
    return generate(model, prompt, interventions=systems, **given)


class Alone(NamedTuple):
    """What is left of a run that is remembered."""

    latents: Tensor
    coverage: dict[str, Any]
    recipe: dict[str, Any]


_remembered: dict[Any, Alone] = {}


def alone(make: Make | None, model: Model, **options: Any) -> Alone:
    """The run of a system by itself, or of none, which leaves the model unharmed. Two models of one name and type are
    the same model."""
    known = (make, model.name, model.dtype, repr(sorted(options.items())))
    if known not in _remembered:
        with unharmed(model, "a run"):
            result = run(model, make() if make else (), **options)
        _remembered[known] = Alone(result.latents, result.coverage, result.recipe)
    return _remembered[known]


_found: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def unharmed(model: Model, after: str = "this") -> Iterator[None]:
    """Fails if the model is not bit-identical afterwards, to what it was when it was last looked at; nobody is given
    the harmed one again."""
    before = {**(_found.get(model.pipe) or fingerprint(model)), **fingerprint()}
    yield
    found = fingerprint(model)
    if found != before:
        forget_pipelines()
        pytest.fail(f"something stayed attached after {after}")
    _found[model.pipe] = found


def drawn(result: Result) -> dict[str, bytes]:
    """Every picture that the systems of a result offer, as bytes, by sample and name."""
    return {
        f"{part.name}.{index}.{name}": picture.tobytes()
        for part in result.parts
        if hasattr(part, "pictures")
        for index in range(len(result))
        for name, picture in part.pictures(result, index).items()
    }


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def check_detaches(make: Make, model: Model) -> None:
    """After a run, and after an interruption in the middle of one, the model is bit-identical."""

    def stop(step: Any) -> None:
        raise KeyboardInterrupt

    alone(make, model)
    with unharmed(model, "a run that was interrupted"), pytest.raises(WorkInterrupted):
        run(model, make(), on_step=stop)


def check_detaches_when_the_denoiser_fails(make: Make, model: Model) -> None:
    """An error, deep inside the network, while attention is being watched, leaves nothing behind either."""
    last = list(model.denoiser.modules())[-1]
    with unharmed(model, "a failure of the denoiser"):
        handle = last.register_forward_pre_hook(_boom)
        try:
            with pytest.raises(RuntimeError, match="boom"):
                run(model, make())
        finally:
            handle.remove()


def _boom(*_: Any) -> None:
    raise RuntimeError("boom")


def check_identity(make: Make, model: Model, weaken: Callable[[], Intervention] | None) -> None:
    """An observer changes not one bit; any other system changes none at strength 0."""
    weak = make if make().role == "observer" else weaken
    if weak is None:
        pytest.skip("has no strength")
    assert same(alone(weak, model).latents, alone(None, model).latents), "the picture changed although it must not"


def check_acts(make: Make, model: Model) -> None:
    """The system did something and says where, and one that is no observer changed the picture."""
    result = alone(make, model)
    (coverage,) = result.coverage.values()
    assert coverage["calls"] > 0 and json.loads(json.dumps(coverage)) == coverage, (
        "coverage must be plain and not empty"
    )
    if make().role != "observer":
        bare = alone(None, model)
        assert not same(result.latents, bare.latents), "the picture is the same with and without the system"


def check_frees(make: Make, model: Model) -> None:
    """What a step needed goes when the step does: nothing waits for the collector of reference cycles."""
    system = make()
    gc.disable()
    gc.freeze()  # what is there already is nobody's concern, and much
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        run(model, system)
        gc.collect()
        left = {type(each).__name__ for each in gc.garbage if isinstance(each, Tensor | Call | Step)}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left, f"kept alive by reference cycles: {left}"


def check_deterministic(make: Make, model: Model) -> None:
    """Always the same: with the same object again, whatever the global random state is, and as another object did."""
    system = make()
    first = run(model, system, decode=True)
    pictures = drawn(first)
    torch.rand(7)
    again = run(model, system, decode=True)
    for other in (again, alone(make, model)):
        assert same(other.latents, first.latents), "latents depend on more than the seed"
    assert drawn(again) == pictures, "pictures depend on more than the seed"


def check_batch_independent(make: Make, model: Model) -> None:
    """A sample does not depend on its neighbours in the batch, up to the rounding of batched kernels."""
    system = make()
    if system.couples_samples:
        pytest.skip("couples its samples, and says so")
    together = run(model, system, prompt=[OTHER_PROMPT, PROMPT], seed=[SEED + 1, SEED])
    single = alone(make, model).latents[0]
    difference = (together.latents[1] - single).abs().max().item()
    tolerance = 1e-3 * single.abs().max().item()
    assert difference < tolerance, f"the second of two samples differs by {difference:.2g} from the same one alone"


def check_wide_pictures(make: Make, model: Model) -> None:
    """Pictures need not be square: the system acts at the same steps and sites, and draws pictures of that shape."""
    size = (48, 32)
    result = run(model, make(), size=size, decode=True)
    assert result.latents.shape[1:] == model.latent_shape(size[1], size[0])
    _same_acts(result, alone(make, model), fewer=True)  # some leave out sites above a number of pixels
    _changes(make, result.latents, alone(None, model, size=size).latents)
    drawn(result)


def check_half_precision(make: Make, model: Model, full: Model) -> None:
    """bfloat16 models are served and stay bfloat16; the system does there what it does in float32, up to rounding."""
    assert model.dtype == torch.bfloat16
    result = run(model, make(), steps=1)
    assert result.latents.dtype == torch.bfloat16
    _changes(make, result.latents, alone(None, model, steps=1).latents)
    precise = alone(make, full, steps=1)
    _same_acts(result, precise)
    error = (result.latents.float() - precise.latents).norm() / precise.latents.norm()
    # rounding is amplified by random networks, most where a gradient comes from a second one (0.41 measured)
    assert error < 0.5, f"in bfloat16 the result is {error:.2g} of its norm away from float32's"


def check_without_guidance(make: Make, model: Model) -> None:
    """A run without an unconditional branch is served as well: the system acts as it does with one."""
    result = run(model, make(), guidance=1.0)
    _same_acts(result, alone(make, model))
    _changes(make, result.latents, alone(None, model, guidance=1.0).latents)


def _same_acts(result: Result, other: Alone, fewer: bool = False) -> None:
    (here,), (there,) = result.coverage.values(), other.coverage.values()
    assert here["steps"] == there["steps"], "acts at other steps"
    found, expected = set(here["sites"]), set(there["sites"])
    assert found == expected or (fewer and found and found < expected), "acts at other sites"


def _changes(make: Make, latents: Tensor, bare: Tensor) -> None:
    assert torch.isfinite(latents).all()
    if make().role == "observer":
        assert same(latents, bare), "the observer changed the picture"
    else:
        assert not same(latents, bare), "the picture is the same with and without the system"


def check_recipe(make: Make, model: Model) -> None:
    """The recipe, through JSON, builds the same system and makes the same sample."""
    system = make()
    first = alone(make, model)
    described = [to_recipe(system), *first.recipe["with"]]
    own = [file for each in described for _, file in opens(type(system).Params, each["params"])]
    assert from_recipe(json.loads(json.dumps(described[0])), own).params == system.params
    again = generate(model, **recipe_args(json.loads(json.dumps(first.recipe)), allow=own), decode=False)
    assert same(first.latents, again.latents)


def check_saves(make: Make, model: Model, folder: Path) -> None:
    """What a system keeps of a run (``maps``) and can save comes back as it was; a damaged file is refused."""
    system = make()
    if not hasattr(system, "maps"):
        pytest.skip("offers nothing to save")
    result = run(model, system, decode=True)
    kept = [each for each in system.maps if hasattr(each, "save")]
    assert kept, "has maps that cannot be saved"
    path = kept[0].save(folder / "kept")
    again = type(kept[0]).load(path)
    assert again.grid(result.images[0]).tobytes() == kept[0].grid(result.images[0]).tobytes()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SfumatoError):
        type(kept[0]).load(path)
    assert [left.name for left in folder.iterdir()] == ["kept"]


class _Enough(Exception):
    """What is to be seen was seen: the rest need not be walked."""


def _first_step(makes: Sequence[Make], model: Model) -> Tensor:
    """Where the first step of a run leads, whose rest is not walked."""
    reached: list[Tensor] = []

    def stop(step: Step) -> None:
        reached.append(step.x.clone())
        raise _Enough

    with contextlib.suppress(_Enough):
        run(model, [make() for make in makes], on_step=stop)
    return reached[0]


def check_composes(makes: Sequence[Make], model: Model, left_out: Sequence[int] | None = None) -> None:
    """Systems that do not conflict run together: each where and when it acts alone, none undone by the others (those
    at ``left_out``, all by default, are left out one by one, observers together), observers changing nothing, in any
    order the same."""
    roles = [make().role for make in makes]
    trajectory: list[Tensor] = []
    with unharmed(model):
        whole = run(model, [make() for make in makes], on_step=lambda step: trajectory.append(step.x.clone()))
        if len(set(roles)) == len(roles):
            assert same(trajectory[0], _first_step(makes[::-1], model)), (
                "roles fix the order, but the order given mattered"
            )
    for make, (name, coverage) in zip(makes, _by_name(makes, whole.coverage), strict=True):
        (expected,) = alone(make, model).coverage.values()
        assert coverage["steps"] == expected["steps"], f"{name} acts at other steps than alone"
        assert set(coverage["sites"]) == set(expected["sites"]), f"{name} acts at other sites than alone"

    def differs_without(out: set[int]) -> bool:
        rest = [make for k, make in enumerate(makes) if k not in out]
        if len(rest) < 2:
            return not same(whole.latents, alone(rest[0] if rest else None, model).latents)
        expected = iter(trajectory)

        def compare(step: Step) -> None:
            if not same(step.x, next(expected, torch.empty(0))):
                raise _Enough

        with contextlib.suppress(_Enough):
            return not same(whole.latents, run(model, [make() for make in rest], on_step=compare).latents)
        return True

    chosen = set(range(len(makes)) if left_out is None else left_out)
    observers = {k for k in chosen if roles[k] == "observer"}
    if observers:
        names = " or ".join(makes[k]().name for k in observers)
        assert not differs_without(observers), f"{names} observes and changed the picture"
    for k in chosen - observers:
        assert differs_without({k}), f"the effect of {makes[k]().name} is gone"


def _by_name(makes: Sequence[Make], coverage: dict[str, Any]) -> list[tuple[str, Any]]:
    """Name and coverage of each system, in the order of ``makes``; the second of a kind is called "name 2"."""
    names = [make().name for make in makes]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    full = [name if n == 1 else f"{name} {n}" for name, n in zip(names, counts, strict=True)]
    return [(name, coverage[name]) for name in full]


def check_conflicts(make: Make, other: Make, model: Model) -> str:
    """Two systems refuse each other with a one-line Conflict, in either order. Returns its text."""
    with unharmed(model):
        with pytest.raises(Conflict) as refusal:
            run(model, [make(), other()])
        with pytest.raises(Conflict):
            run(model, [other(), make()])
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def check_neutral(make: Make, weaken: Sequence[Make], model: Model) -> None:
    """Beside systems at strength 0, however many, another one makes what it makes alone, bit for bit."""
    together = run(model, [make(), *(weak() for weak in weaken)])
    assert same(together.latents, alone(make, model).latents), "a system of strength 0 changed what another does"


GUIDANCE: dict[str, dict[str, Any]] = {
    "negative": {"negative": "a small cone"},
    "rescale": {"rescale": 0.7},
    "interval": {"guidance": Guidance(3.0, interval=(0.0, 0.5))},
    "compose": {"compose": [("a yellow dog", 1.5)]},
}


def check_guidance(make: Make, variant: str, model: Model) -> str:
    """A system and a variant of guidance: both act, or they refuse with a Conflict, whose reason is returned."""
    with unharmed(model):
        try:
            both = run(model, make(), **GUIDANCE[variant])
        except Conflict as refusal:
            assert "\n" not in str(refusal)
            return str(refusal)
    bare, single = alone(None, model, **GUIDANCE[variant]), alone(make, model)
    assert torch.isfinite(both.latents).all()
    if make().role == "observer":
        assert same(both.latents, bare.latents), "the observer changed the picture"
    else:
        assert not same(both.latents, single.latents), f"{variant} has no effect beside the system"
        assert not same(both.latents, bare.latents), f"the system has no effect beside {variant}"
    return ""


def check_unknown_words(make_with_words: Callable[[list[str]], Intervention], model: Model) -> None:
    """A word that the prompt does not hold is an error that names the nearest words, before any work."""
    with unharmed(model), pytest.raises(NoMatch) as caught:
        run(model, make_with_words(["cubes"]))
    message = str(caught.value)
    assert "cubes" in message and "cube" in message.replace("cubes", "") and "\n" not in message


def check_refuses(make: Make, model: Model, missing: str) -> None:
    """On a model without the capability ``missing`` the refusal is NotSupported, in one line that names the system,
    what it needs, and the model."""
    with unharmed(model), pytest.raises(SfumatoError) as caught:
        run(model, make())
    message = str(caught.value)
    assert isinstance(caught.value, NotSupported) and "\n" not in message, message
    expected = f"{make().name} needs {CAPABILITIES[missing]}; {model.name} ({model.family.name}) has none; "
    assert message == f"{expected}{families_with(*make().CARD.needs)}.", f"{message!r} does not begin with {expected!r}"
    assert model.family.name not in message.rpartition("families ")[2].rstrip(".").split(", ")
