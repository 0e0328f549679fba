"""Training in memory: players with optimizers of their own, and everything that may end or interrupt them."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from sfumato.errors import BadInput, BadWeights
from sfumato.interrupts import interruptions_raised, stopped_by_signals
from sfumato.training import Draw, Player, fit, shuffled

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3


def network(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.BatchNorm1d(8), nn.Linear(8, 1))


def player(net: nn.Module, **more) -> Player:
    def loss(draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        rows = draw.indices(len(X), 8)
        error = F.mse_loss(net(X[rows]), Y[rows])
        return error, {"root": error.detach().sqrt()}

    return Player(loss, torch.optim.AdamW(net.parameters(), lr=0.02), net, **more)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_fit_is_the_plain_loop() -> None:
    net, plain = network(), network()
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    with torch.no_grad():  # whatever the caller's mode
        found = fit(player(net, clip=0.5, schedule=lambda step: 1 / (1 + step)), 12, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.02)
    for step in range(12):
        rows = Draw(3, step).indices(len(X), 8)
        optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
        loss = F.mse_loss(plain(X[rows]), Y[rows])
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        logs = found.history[step].logs
        assert logs["loss"] == float(loss.detach()) and logs["norm"] == float(norm)
        assert logs["root"] == float(loss.detach().sqrt())
    assert same(net, plain) and found.finished and not found.interrupted and found.step == 12
    assert all(p.grad is None for p in net.parameters())


def test_tensors_can_be_players_and_a_schedule_can_give_the_learning_rate_itself() -> None:
    z = torch.zeros(2, requires_grad=True)
    descent = torch.optim.SGD([z], lr=1.0)
    fit(Player(lambda _: (z - 1).square().sum(), descent, schedule=lambda step: 0.1 * (step + 1)), 2)
    first = 0.2  # z -= lr * 2 (z - 1)
    assert z.tolist() == pytest.approx([first + 0.2 * 2 * (1 - first)] * 2)


def test_players_alternate_and_touch_only_their_own() -> None:
    critic, generator = nn.Linear(2, 1), nn.Linear(2, 2)
    critic_again, generator_again = copy.deepcopy(critic), copy.deepcopy(generator)
    turns: list[str] = []
    made: list[int] = []

    def critic_loss(batch: Tensor, draw: Draw) -> Tensor:
        turns.append("critic")
        # the generator is in this graph too: its gradients must neither arise nor stay
        return critic(generator(batch)).square().mean() - critic(batch).mean()

    def generator_loss(batch: Tensor, draw: Draw) -> Tensor:
        turns.append("generator")
        assert all(p.grad is None for p in [*critic.parameters(), *generator.parameters()])
        return -critic(generator(batch)).mean()

    def data(draw: Draw) -> Tensor:
        made.append(draw.step)
        return torch.randn(4, 2, generator=draw.generator("batch"))

    players = [
        Player(critic_loss, torch.optim.SGD(critic.parameters(), lr=0.1), critic, name="critic"),
        Player(generator_loss, torch.optim.SGD(generator.parameters(), lr=0.2), generator, name="generator", every=2),
    ]
    found = fit(players, 3, data)
    assert turns == ["critic", "generator", "critic", "critic", "generator"]
    assert made == [0, 1, 2]  # one batch a step, for both
    assert set(found.history[0].logs) == {"critic.loss", "generator.loss"}
    assert set(found.history[1].logs) == {"critic.loss"}
    for step in range(3):
        batch = torch.randn(4, 2, generator=Draw(0, step).generator("batch"))
        one = critic_again(generator_again(batch)).square().mean() - critic_again(batch).mean()
        descend(critic_again, one, 0.1)
        if step % 2 == 0:
            descend(generator_again, -critic_again(generator_again(batch)).mean(), 0.2)
    for a, b in ((critic, critic_again), (generator, generator_again)):
        torch.testing.assert_close(dict(a.named_parameters()), dict(b.named_parameters()))


def descend(net: nn.Module, loss: Tensor, lr: float) -> None:
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    with torch.no_grad():
        for p, gradient in zip(net.parameters(), gradients, strict=True):
            p -= lr * gradient


def test_a_step_in_parts_is_the_whole_step() -> None:
    whole, parts = network(), network()
    for net in (whole, parts):
        net.eval()  # batch norm would tell the parts apart
    fit(player(whole), 5)
    found = fit(player(parts), 5, accumulate=4)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not same(whole, network()) and found.step == 5


def test_the_average_is_that_of_diffusers_and_stays_at_the_end() -> None:
    net, live = network(), network()
    fit(player(net, ema=0.95), 20)
    average = EMAModel(live.parameters(), decay=0.95)
    fit(player(live), 20, on_progress=lambda _: average.step(live.parameters()))
    for ours, theirs in zip(net.parameters(), average.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(net[0].weight, live[0].weight, atol=1e-3)


@pytest.mark.parametrize("which", ["SIGINT", "SIGTERM"])
def test_programs_do_not_go_on_with_half_of_a_fit_that_nobody_can_resume(tmp_path: Path, which: str) -> None:
    def interrupt(progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), getattr(signal, which))

    with stopped_by_signals():
        assert fit(player(network()), 8, on_progress=interrupt).interrupted  # a library's caller reads the record
        with interruptions_raised():
            seen: list[int] = []
            with pytest.raises(KeyboardInterrupt):
                fit(player(network()), 8, on_progress=lambda p: (seen.append(p.step), interrupt(p)))
            assert seen == [1, 2, 3]
            assert fit(player(network()), 8, folder=tmp_path, on_progress=interrupt).interrupted
        assert fit(player(network()), 8, on_progress=interrupt).interrupted


@pytest.mark.parametrize("way", ["interrupt", "stop", "minutes"])
def test_ended_early_it_keeps_what_was_learnt_and_a_folder_goes_on_bit_for_bit(tmp_path: Path, way: str) -> None:
    whole, parts = network(dropout=0.3), network(dropout=0.3)
    expected = fit(player(whole, ema=0.9), 8)

    def interrupt(progress) -> None:
        if way == "interrupt" and progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    ends = {"stop": lambda progress: way == "stop" and progress.step == 3}
    ends["minutes"] = 1e-9 if way == "minutes" else None
    first = fit(player(parts, ema=0.9), 8, folder=tmp_path, on_progress=interrupt, **ends)
    assert signal.getsignal(signal.SIGINT) == handler
    assert not first.finished and first.interrupted == (way == "interrupt")
    assert first.step == (1 if way == "minutes" else 3) == len(first.history)
    fresh = network(seed=5, dropout=0.3)  # another start: all comes from the folder
    second = fit(player(fresh, ema=0.9), 8, folder=tmp_path)
    assert second.finished and same(whole, fresh)
    assert [p.logs for p in first.history + second.history] == [p.logs for p in expected.history]


def test_a_second_interruption_is_at_once() -> None:
    def twice(draw: Draw) -> Tensor:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return z.sum()

    z = torch.zeros(1, requires_grad=True)
    with pytest.raises(KeyboardInterrupt):
        fit(Player(twice, torch.optim.SGD([z], lr=0.1)), 3)
    assert not z.any()


def test_divergence_strangers_and_mistakes_are_named(tmp_path: Path) -> None:
    z = torch.ones(2, requires_grad=True)

    def one(loss=lambda _: z.sum(), **more) -> Player:
        return Player(loss, torch.optim.SGD([z], lr=0.1), **more)

    with pytest.raises(BadInput, match="latents diverged at step 1: lower the learning rate"):
        fit(one(lambda _: z.sum() / 0), 3, name="latents")
    with torch.no_grad():
        z.fill_(1.0)
    with pytest.raises(BadInput, match="names of their own, got a, a"):
        fit([one(name="a"), one(name="a")], 3)
    with pytest.raises(BadInput, match="name of a player is 'my critic'"):
        one(name="my critic")
    with pytest.raises(BadInput, match="every=0"):
        one(every=0)
    with pytest.raises(BadInput, match="above 0"):
        fit(one(), 3, minutes=0)
    fit(one(), 2, folder=tmp_path)
    with pytest.raises(BadWeights, match="does not fit"):
        fit(player(network()), 3, folder=tmp_path)


def test_shuffled_passes_see_every_row_once() -> None:
    rows = shuffled(7, 3, 2, seed=4)
    assert [len(each) for each in rows] == [3, 3, 1] * 2
    first, second = torch.cat(rows[:3]), torch.cat(rows[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(7)) and not torch.equal(first, second)
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(first, torch.randperm(7, generator=generator))
    assert torch.equal(second, torch.randperm(7, generator=generator))
