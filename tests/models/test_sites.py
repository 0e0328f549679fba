"""Sites against the attention calls that really happen: order, heads, lengths, and where image and text lie."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sfumato.errors import BadInput
from sfumato.models import Model, Site
from tests.tiny import KINDS, tiny_model

SIZES = [(32, 48), (40, 24)]


class Calls(TorchFunctionMode):
    """Queries and keys of every call of scaled dot-product attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            bound = [*args, *(kwargs[name] for name in ("query", "key") if name in (kwargs or {}))]
            self.seen.append((bound[0], bound[1]))
        return function(*args, **(kwargs or {}))


def latents(model: Model, size: tuple[int, int]) -> torch.Tensor:
    model.timesteps(model.make_scheduler(), 1, *size)  # as every run begins: inpainting models get ready for the size
    return torch.randn(1, *model.latent_shape(*size), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sites_are_the_attention_calls(kind: str, size: tuple[int, int]) -> None:
    model = tiny_model(kind)
    check_against_calls(model, latents(model, size), model.sites(*size))


def test_odd_sides_round_up_as_they_are_halved() -> None:
    """Stable Diffusion at 520 pixels has latents of 65, then 33, 17, 9; here 13, 7."""
    model = tiny_model("sd")
    sites = model.family.sites(18, 13, model.text_length)
    assert {site.grid for site in sites} == {(18, 13), (9, 7)}
    check_against_calls(model, torch.zeros(1, 4, 18, 13), sites)


def check_against_calls(model: Model, x: torch.Tensor, sites: list[Site]) -> None:
    assert [site.index for site in sites] == list(range(len(sites)))
    order: list[str] = []
    handles = [
        model.denoiser.get_submodule(site.path).register_forward_pre_hook(
            lambda *_, path=site.path, **__: order.append(path), with_kwargs=True
        )
        for site in sites
    ]
    condition = model.encode_text("a red cube", guidance=False)
    try:
        with Calls() as calls:
            model.predict(x, 500.0, condition)
    finally:
        for handle in handles:
            handle.remove()

    assert order == [site.path for site in sites]
    assert len(calls.seen) == len(sites)
    for site, (q, k) in zip(sites, calls.seen, strict=True):
        n, t = site.grid[0] * site.grid[1], model.text_length
        n = site.frames if site.kind == "temporal" else n
        assert site.image[1] - site.image[0] == n
        assert q.shape[:2] == (site.fold, site.heads)
        lengths = {"self": (n, n), "cross": (n, t), "joint": (n + t, n + t), "temporal": (n, n)}
        assert (q.shape[2], k.shape[2]) == lengths[site.kind]
        assert site.text is None if site.kind in ("self", "temporal") else site.text[1] - site.text[0] == t
        if site.kind == "joint":  # the two ranges tile the sequence
            first, second = sorted([site.image, site.text])
            assert (first[0], first[1], second[1]) == (0, second[0], n + t)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sites_of_a_clip_fold_frames_or_cells(size: tuple[int, int]) -> None:
    model = tiny_model("animatediff")
    x = torch.randn(1, *model.latent_shape(*size, 3), generator=torch.Generator().manual_seed(0))
    sites = model.sites(*size, frames=3)
    check_against_calls(model, x, sites)
    assert {(site.kind, site.fold) for site in sites if site.grid == (size[0] // 2, size[1] // 2)} == {
        ("self", 3), ("cross", 3), ("temporal", size[0] // 2 * (size[1] // 2))
    }  # fmt: skip


def test_rows_of_a_clip_are_samples_then_frames_or_cells() -> None:
    """Move one latent of one frame of the second clip: in the first picture layer only its row moves, in the first
    temporal layer rows of its sample move, most of all that of its cell at its frame."""
    model, size, frames = tiny_model("animatediff"), (32, 48), 3
    condition = model.encode_text(["a red cube", "a dog"], guidance=False)
    x = torch.randn(2, *model.latent_shape(*size, frames), generator=torch.Generator().manual_seed(0))
    moved = x.clone()
    moved[1, :, 2, 5, 9] += 3
    sites = model.sites(*size, frames=frames)
    first = next(site for site in sites if site.kind == "self")
    temporal = next(site for site in sites if site.kind == "temporal")
    change = {
        site.kind: (queries(model, moved, condition, site) - queries(model, x, condition, site)).abs().sum((1, 3))
        for site in (first, temporal)
    }  # (rows, queries)
    assert change["self"].sum(1).nonzero().flatten().tolist() == [1 * frames + 2]
    cells = temporal.grid[0] * temporal.grid[1]
    rows = change["temporal"].sum(1)
    assert rows[:cells].sum() == 0 and rows[cells:].sum() > 0
    row, frame = divmod(int(change["temporal"].argmax()), frames)
    hottest = divmod(row - cells, temporal.grid[1])
    assert max(abs(hottest[0] - 5), abs(hottest[1] - 9)) <= 1 and frame == 2


@pytest.mark.parametrize("kind", ["sd3", "sd35", "sd3clip", "flux", "schnell"])
def test_joint_order_by_perturbation(kind: str) -> None:
    """Move one text token (image token) that enters a block: only its row of the keys moves, where the site says."""
    model = tiny_model(kind)
    condition = model.encode_text("a red cube", guidance=False)
    joint = [site for site in model.sites(32, 48) if site.kind == "joint"]
    assert {site.block.split(".")[0] for site in joint} == (
        {"joint"} if kind.startswith("sd3") else {"joint", "single"}
    )
    for site in joint:
        block = model.denoiser.get_submodule(site.path.rpartition(".")[0])
        inputs = block_inputs(model, block, condition)
        reference = keys_of(block, inputs)
        for name, start in (("encoder_hidden_states", site.text[0]), ("hidden_states", site.image[0])):
            moved = dict(inputs)
            moved[name] = inputs[name].clone()
            moved[name][:, 5] += torch.linspace(-1, 1, inputs[name].shape[-1])
            changed = (keys_of(block, moved) - reference).abs().amax(dim=(0, 1, 3)).nonzero().flatten().tolist()
            assert changed == [start + 5]


def block_inputs(model: Model, block: torch.nn.Module, condition: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def keep(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        found.update(inspect.signature(block.forward).bind(*args, **kwargs).arguments)

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model.predict(latents(model, (32, 48)), 500.0, condition)
    finally:
        handle.remove()
    return found


def keys_of(block: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with Calls() as calls:
        block(**inputs)
    return calls.seen[0][1]


@pytest.mark.parametrize("kind", KINDS)
def test_grid_is_row_major(kind: str) -> None:
    """Move one latent: among the queries of the first site, the row that moves most is the one at its place."""
    model = tiny_model(kind)
    size = (32, 48)
    site = model.sites(*size)[0]
    condition = model.encode_text("a red cube", guidance=False)
    x = latents(model, size)
    row, column = 5, 9
    latents_per_token = x.shape[-1] // site.grid[1]
    moved = x.clone()
    moved[..., row * latents_per_token, column * latents_per_token] += 3
    change = (queries(model, moved, condition, site) - queries(model, x, condition, site)).abs().sum(dim=(0, 1, 3))
    hottest = divmod(int(change[site.image[0] : site.image[1]].argmax()), site.grid[1])
    assert max(abs(hottest[0] - row), abs(hottest[1] - column)) <= 1  # convolutions come first in a U-Net


def queries(model: Model, x: torch.Tensor, condition: Any, site: Site) -> torch.Tensor:
    with Calls() as calls:
        model.predict(x, 500.0, condition)
    return calls.seen[site.index][0]


def test_names_and_kinds() -> None:
    def blocks(kind: str) -> list[str]:
        return [f"{site.block}:{site.kind}" for site in tiny_model(kind).sites()]

    assert blocks("sd")[:2] == ["down.0:self", "down.0:cross"]
    assert blocks("sd")[2:4] == ["mid:self", "mid:cross"]
    assert blocks("sd")[4:] == ["up.1:self", "up.1:cross"] * 2
    assert blocks("sd3") == ["joint.0:joint", "joint.1:joint"]
    assert blocks("sd35") == ["joint.0:joint", "joint.0:self", "joint.1:joint"]
    assert blocks("flux") == ["joint.0:joint", "single.0:joint", "single.1:joint"]
    assert blocks("animatediff")[:4] == ["down.0:self", "down.0:cross", "down.0:temporal", "down.0:temporal"]
    assert blocks("pixart") == ["block.0:self", "block.0:cross", "block.1:self", "block.1:cross"]


def test_sites_of_a_size_the_model_cannot_make() -> None:
    with pytest.raises(BadInput, match=r"width=33 does not fit tiny-sd: give a positive multiple of 8 pixels"):
        tiny_model("sd").sites(32, 33)
    with pytest.raises(BadInput, match="height=-8"):
        tiny_model("sd").sites(-8, 32)
    with pytest.raises(BadInput, match="frames=2, but tiny-sd makes pictures, not clips"):
        tiny_model("sd").sites(frames=2)
    for frames in (0, 9, True):
        with pytest.raises(BadInput, match=f"frames={frames} does not fit tiny-animatediff: give 1 to 8"):
            tiny_model("animatediff").latent_shape(32, 32, frames)


def test_other_text_length() -> None:
    site = tiny_model("flux").sites(32, 32, text_length=20)[0]
    assert (site.text, site.image) == ((0, 20), (20, 20 + 64))
