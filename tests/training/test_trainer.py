"""The trainer: stopping anywhere changes nothing, damage is noticed, mistakes are one line."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from sfumato import files
from sfumato.errors import BadInput, BadWeights, Conflict, NotSupported, UnknownName
from sfumato.training import Draw, checkpoint, data, run
from sfumato.training.__main__ import main as training_main
from sfumato.training.optim import Muon, orthogonalise
from sfumato.training.precision import ExplicitAttention
from sfumato.training.recipe import DataOptions, load_recipe
from sfumato.training.runs import TrainingRun
from sfumato.training.schedules import warmup_decay

RECIPE = """
name = "tiny"
objective = "vae"
{top}
[data]
train = 24
val = 8
[model]
channels = [8, 8, 16]
{model}
[loss]
crop = 32
[train]
steps = {steps}
batch = 4
warmup = 2
log_every = 1
checkpoint_every = 2
grid_every = 4
evaluate_every = 100
{train}
"""


@pytest.fixture(scope="module")
def toybox_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def home(toybox_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own that shares the rendered scenes."""
    (toybox_cache / "toybox").mkdir(exist_ok=True)
    (tmp_path / "toybox").symlink_to(toybox_cache / "toybox")
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    return tmp_path


def write(home: Path, steps: int = 6, model: str = "", train: str = 'optimizer = "muon"', top: str = "") -> Path:
    path = home / "tiny.toml"
    path.write_text(RECIPE.format(steps=steps, model=model, train=train, top=top))
    return path


def losses(home: Path) -> dict[int, float]:
    lines = (home / "runs" / "tiny" / "log.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines) if "loss" in entry}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_interrupted_and_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    home: Path, optimizer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write(home, train=f'optimizer = "{optimizer}"')
    whole = run(recipe)
    assert whole.finished and whole.step == 6 and capfd.readouterr() == ("", "")  # nor do the libraries say anything
    expected, weights = losses(home), load_file(whole.exported / "diffusion_pytorch_model.safetensors")
    (home / "runs" / "tiny").rename(home / "runs" / "whole")

    def interrupt(progress):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    first = run(recipe, on_progress=interrupt)
    assert first.interrupted and not first.finished and first.step == 3 and first.exported is None
    second = run(recipe, resume=True)
    assert second.finished and losses(home) == expected
    again = load_file(second.exported / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[key], again[key]) for key in weights) and again.keys() == weights.keys()
    assert (home / "runs" / "tiny" / "grid_00000004.png").is_file()
    card = json.loads((second.exported / "sfumato.json").read_text())
    assert card["training"]["steps"] == 6 and card["quality"] == second.quality and "psnr" in card["quality"]
    assert "sfumato train tiny" in (second.exported / "MODEL_CARD.md").read_text()


def test_a_checkpoint_of_the_first_releases_goes_on_too(home: Path) -> None:
    whole = run(write(home))
    expected = losses(home)
    (whole.folder / "checkpoints" / "step_00000006").rename(home / "late")
    old = whole.folder / "checkpoints" / "step_00000004"
    tensors, state = checkpoint.load(old)
    # one player, whose moments bore no name; no accumulation in the recipe
    tensors = {key.replace("moments.model.", "moments."): value for key, value in tensors.items()}
    del state["recipe"]["train"]["accumulate"], state["plans"][0]["train"]["accumulate"]
    checkpoint.save(old.parent, 4, tensors, {key: state[key] for key in ("recipe", "plans", "seconds")})
    again = run(write(home), resume=True)
    assert again.finished and losses(home) == expected and any(".momentum_buffer" in key for key in tensors)
    assert len(json.loads((again.exported / "sfumato.json").read_text())["training"]["plans"]) == 1


def test_minutes_stop_early_with_a_checkpoint_and_global_randomness_is_untouched(home: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    result = run(write(home, steps=1000), minutes=1e-6)
    assert not result.finished and not result.interrupted and result.exported is None
    assert checkpoint.listing(result.folder / "checkpoints")
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_second_run_needs_resume_and_resume_needs_the_same_recipe(home: Path) -> None:
    run(write(home, steps=2))
    with pytest.raises(Conflict, match="resume it, or remove"):
        run(write(home, steps=2))
    with pytest.raises(Conflict, match="another model"):
        run(write(home, steps=2, model="layers = 2"), resume=True)
    longer = run(write(home, steps=3), resume=True)  # the schedule may be planned anew, and the card says so
    assert longer.finished and longer.step == 3
    plans = json.loads((longer.exported / "sfumato.json").read_text())["training"]["plans"]
    assert [(plan["from_step"], plan["train"]["steps"]) for plan in plans] == [(0, 2), (2, 3)]
    assert "planned anew at step 2" in (longer.exported / "MODEL_CARD.md").read_text()


def test_damaged_checkpoint_is_refused_and_the_previous_one_used(home: Path) -> None:
    result = run(write(home, steps=4))
    newest = result.folder / "checkpoints" / "step_00000004" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    again = run(write(home, steps=4), resume=True)
    assert again.step == 4 and len(again.warnings) == 1 and "step_00000004 is damaged" in again.warnings[0]
    for path in (result.folder / "checkpoints").glob("*/state.json"):
        path.write_text("{")
    with pytest.raises(BadWeights, match="no sound checkpoint"):
        run(write(home, steps=4), resume=True)


def test_checkpoints_are_written_beside_and_only_the_last_two_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"a": torch.full((2,), float(step))}, {"note": "x"})
    assert [path.name for path in checkpoint.listing(tmp_path)] == ["step_00000002", "step_00000003"]

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError):
        checkpoint.save(tmp_path, 4, {"a": torch.zeros(2)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    tensors, state, warnings = checkpoint.load_latest(tmp_path)
    assert tensors["a"].tolist() == [3.0, 3.0] and state["step"] == 3 and warnings == []


def test_averaged_weights_are_in_place_only_within(home: Path) -> None:
    this = TrainingRun(load_recipe(write(home)), home)
    trainer, vae = this.trainer, this.objective.vae
    parameters = trainer.players[0].parameters
    mine = {key: p.detach().double() for key, p in parameters.items()}
    for step in range(3):
        trainer.train_step()
        weight = max(1 - this.options.ema, 9 / (9 + step + 1))
        mine = {key: mine[key] + weight * (p.detach().double() - mine[key]) for key, p in parameters.items()}
    live = {key: p.detach().clone() for key, p in parameters.items()}
    with trainer.averaged():
        assert not vae.training
        for key, p in parameters.items():
            torch.testing.assert_close(p.double(), mine[key], atol=1e-6, rtol=1e-5)
    assert vae.training
    assert all(torch.equal(live[key], p) for key, p in parameters.items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"top": "sead = 3"}, UnknownName, "Did you mean 'seed'"),
        ({"train": "warm_up = 3"}, UnknownName, "train.warm_up.*Did you mean 'warmup'"),
        ({"model": "layrs = 3"}, UnknownName, "model.layrs.*Did you mean 'layers'"),
        ({"train": "lr = -1"}, BadInput, r"train\.lr: input should be greater than 0, got -1"),
        ({"train": 'decay = "cosin"'}, BadInput, r"train\.decay.*cosine"),
        ({"steps": 0}, BadInput, r"train\.steps"),
        ({"top": "seed ="}, BadInput, "is not TOML"),
    ],
)
def test_recipe_mistakes_are_one_line_with_the_nearest_name(
    home: Path, change: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(write(home, **change))
    assert "\n" not in str(caught.value)


def test_unknown_names_and_minutes_are_refused(home: Path) -> None:
    with pytest.raises(UnknownName, match="'toy-sd3'"):
        run("toy-sdd3")
    path = write(home)
    path.write_text(path.read_text().replace('objective = "vae"', 'objective = "vea"'))
    with pytest.raises(UnknownName, match="unknown objective 'vea'.*'vae'"):
        run(path)
    with pytest.raises(BadInput, match="minutes must be above 0"):
        run(write(home), minutes=0)


def test_rate_warms_up_and_decays_to_zero() -> None:
    def at(step: int, **options) -> float:
        return warmup_decay(110, 10, **options)(step)

    assert [at(s, decay="none") for s in (0, 4, 9, 10, 109)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert at(60, decay="linear") == 0.5 and at(110, decay="linear") == 0
    assert at(60, decay="cosine") == pytest.approx(0.5) and at(35, decay="cosine") == pytest.approx(0.8535534)
    assert at(60, decay="wsd", fraction=0.5) == 1 and at(85, decay="wsd", fraction=0.5) == pytest.approx(0.5)


def test_draws_visit_every_sample_once_an_epoch_and_ranks_share_a_batch() -> None:
    seen = torch.cat([Draw(3, step).indices(10, 4) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    shares = [Draw(3, 2, rank, 2).indices(10, 4) for rank in range(2)]
    assert sorted(torch.cat(shares).tolist()) == sorted(Draw(3, 2).indices(10, 4).tolist())
    noise = [torch.randn(3, generator=Draw(3, 2).generator(name)) for name in ("a", "a", "b")]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])


def test_explicit_attention_is_attention_and_leaves_masked_calls_alone() -> None:
    query, key, value = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, 0] = True
    attend = torch.nn.functional.scaled_dot_product_attention
    calls = ({}, {"scale": 0.3}, {"attn_mask": mask}, {"is_causal": True})
    fused = [attend(query, key, value, **call) for call in calls]
    with ExplicitAttention():
        explicit = [attend(query, key, value, **call) for call in calls]
    for one, other in zip(explicit, fused, strict=True):
        torch.testing.assert_close(one, other)
    assert [torch.equal(one, other) for one, other in zip(explicit, fused, strict=True)][2:] == [True, True]


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_orthogonalise_pulls_singular_values_to_one_and_keeps_directions(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonalise(matrix) @ vh.T
    assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-9
    assert inside.diagonal().min() > 0.3 and inside.diagonal().max() < 1.3
    a, b, c = 3.4445, -4.7750, 2.0315  # by hand: singular values alone go through the iteration
    s = s / s.norm()
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(inside.diagonal(), s)
    torch.testing.assert_close(orthogonalise(torch.stack([-matrix, matrix]))[1], orthogonalise(matrix))


def test_the_adamw_half_of_muon_is_torch_adamw_and_the_muon_half_its_formula() -> None:
    start = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    ours, reference, kernel = (torch.nn.Parameter(start.clone()) for _ in range(3))
    groups = [
        {"params": [kernel], "muon": True, "lr": 0.1, "weight_decay": 0.05},
        {"params": [ours], "muon": False, "lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99)},
    ]
    muon, adamw = Muon(groups), torch.optim.AdamW([reference], lr=0.01, weight_decay=0.1, betas=(0.9, 0.99))
    expected, momentum = start.clone(), torch.zeros_like(start)
    for step in range(3):
        grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(10 + step))
        ours.grad, reference.grad, kernel.grad = grad.clone(), grad.clone(), grad.clone()
        muon.step(), adamw.step()
        momentum = 0.95 * momentum + 0.05 * grad
        update = orthogonalise((0.05 * grad + 0.95 * momentum).reshape(4, 18)).reshape(start.shape)
        expected = expected * (1 - 0.1 * 0.05) - 0.1 * update  # 4 rows, 18 columns: no further scale
    assert torch.equal(ours, reference)
    torch.testing.assert_close(kernel.detach(), expected, atol=1e-5, rtol=1e-5)


def test_a_recipe_trains_on_a_folder_of_pictures(home: Path) -> None:
    folder = home / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(generator.integers(0, 256, (40, 60, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a red ball {i}")
    recipe = write(home, steps=2)
    recipe.write_text(recipe.read_text().replace("train = 24", f'train = 100\nfolder = "{folder}"'))
    done = run(recipe)
    assert done.finished and set(done.quality) == {"psnr", "psnr_pooled"}
    card = json.loads((done.exported / "sfumato.json").read_text())
    assert (
        card["data"]["folder"]["name"] == "pictures"
        and "no photographs" not in (done.exported / "MODEL_CARD.md").read_text()
    )
    options = DataOptions(folder=str(folder), size=32, val=3)
    train, val = data.dataset("train", options), data.dataset("val", options)
    assert len(train) == 11 and len(val) == 1 and not set(train.rows) & set(val.rows)
    row = train.rows[4]
    picture = Image.open(train.samples.entries[row].shown.path)
    expected = np.asarray(files.fitted(picture, (32, 32)))
    assert (train.images[4] == expected).all() and (train.images[np.array([4, 5])][0] == expected).all()
    assert train.caption(4).text == (folder / f"{Path(picture.filename).stem}.txt").read_text()
    assert (train.masks[4] == -1).all()
    name = train.folder
    assert train.folder == name
    os.utime(picture.filename, (1, 1))
    assert train.folder != name
    with pytest.raises(NotSupported, match="what the toybox knows"):
        _ = train.scenes


def _process(rank: int, port: int, recipe: Path) -> None:
    """What torchrun starts, in a process that has imported everything already."""
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent has trained alone
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port)}
    sys.argv = ["sfumato.training", str(recipe)]
    sys.exit(training_main())


def test_two_processes_are_one_process_in_two_parts(home: Path) -> None:
    recipe = write(home, steps=3, train='optimizer = "muon"\naccumulate = 2')
    one = run(recipe)
    expected, weights = losses(home), load_file(one.exported / "diffusion_pytorch_model.safetensors")
    (home / "runs" / "tiny").rename(home / "runs" / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=_process, args=(rank, port, write(home, steps=3))) for rank in (0, 1)]
    for each in both:
        each.start()
    for each in both:
        each.join(120)
    assert [each.exitcode for each in both] == [0, 0]
    assert losses(home) == pytest.approx(expected, rel=1e-5)
    again = load_file(home / "runs" / "tiny" / "export" / "diffusion_pytorch_model.safetensors")
    for key, value in weights.items():
        torch.testing.assert_close(again[key], value)
