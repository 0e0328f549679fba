"""What the claims about codes share: pictures, a network that reads concepts off decoded pictures, and its ceiling.

The *probe* is a small convolutional network, one head for each concept, trained on renders of scenes that no claim is
measured on, half of them through the autoencoder. What it reads from reconstructions of unseen scenes is the ceiling
beside every figure that leans on it. It judges and never guides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from claims.core import Context
from sfumato import files, registry
from sfumato.metrics import stats
from sfumato.metrics.frechet import Moments, frechet
from sfumato.models.nets.vector_ae import VectorAutoencoder, load_autoencoder
from sfumato.models.weights import hash_modules
from sfumato.rng import hashed
from sfumato.toybox.styles import styled
from sfumato.training import Draw, Player, fit
from sfumato.translation.examples import LabelledVectors, toybox_examples
from sfumato.translation.networks import Network, network_of

READ = ("shape", "texture", "color", "place", "ground", "sky")
SIDE = 64
TRAIN, TEST = 16_000, 500  # of the first, toy-ae was trained on a quarter; the others nothing was
PROBED = 4000  # pictures that the probe is trained on, in every style
SEEDS = (0, 1, 2)
STEPS = 900


def autoencoder(context: Context) -> Network:
    """toy-ae as a giver of vectors."""
    return context.once("toy-ae", lambda: network_of(ae_of(context), name="toy-ae"))


def ae_of(context: Context) -> VectorAutoencoder:
    return context.once("toy-ae module", lambda: load_autoencoder(context.folder("toy-ae")))


def train_set(context: Context) -> LabelledVectors:
    """The pictures that flows learn from; the first quarter are those of toy-ae."""
    return context.once("train", lambda: toybox_examples(context.count(TRAIN, 96), SIDE, (*READ, "scenery")))


def test_set(context: Context) -> LabelledVectors:
    """Pictures of scenes that nothing was trained on."""
    n = context.count(TEST, 32)
    return context.once("test", lambda: toybox_examples(n, SIDE, (*READ, "scenery"), split="test"))


def codes(context: Context, part: str) -> tuple[Tensor, Tensor]:
    """Means and deviations (m 64) of toy-ae's codes of the "train" or "test" set."""

    def made() -> tuple[Tensor, Tensor]:
        found = autoencoder(context).vectors((train_set if part == "train" else test_set)(context).pixels)
        assert found[1] is not None
        return found[0], found[1]

    return context.once(f"codes {part}", made)


class Probe(nn.Module):
    """Pictures (b 3 h w) to one row of logits for each concept."""

    def __init__(self, words: dict[str, int]):
        super().__init__()
        widths = (3, 24, 48, 64)
        self.trunk = nn.Sequential(
            *[
                layer
                for a, b in zip(widths, widths[1:], strict=False)
                for layer in (nn.Conv2d(a, b, 4, 2, 1), nn.GroupNorm(8, b), nn.ReLU())
            ],
            nn.Conv2d(64, 64, 3, 1, 1), nn.GroupNorm(8, 64), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
            nn.Linear(1024, 128), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(128, n) for name, n in words.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        seen = self.trunk(x)
        return {name: head(seen) for name, head in self.heads.items()}


def trained_probe(context: Context, styles: Sequence[str] = ()) -> Probe:
    """The probe, trained once for all claims and kept in the cache under the hash of toy-ae."""

    def trained() -> Probe:
        examples, network = train_set(context), autoencoder(context)
        examples = examples.rows(torch.arange(min(PROBED, len(examples))))
        marks = (hash_modules({"ae": ae_of(context)}), styles, STEPS, context.quick, len(examples))
        kept = registry.cache_folder() / "claims" / f"probe-{hashed(repr(marks)):x}.safetensors"
        plain = examples.pixels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(77)
            net = Probe({name: len(examples.names[name]) for name in READ})
        if kept.is_file():
            net.load_state_dict(load_file(kept))
            return net.eval().requires_grad_(False)

        shown = [plain, network.pictures(codes(context, "train")[0][: len(plain)])]
        for style in styles:
            x = styled(plain, style)
            shown += [x, network.pictures(network.vectors(x)[0])]

        def loss(draw: Draw) -> Tensor:
            rows = draw.indices(len(plain), 48)
            kind = torch.randint(len(shown), (len(rows),), generator=draw.generator("kind"))
            x = torch.stack([shown[k][i] for k, i in zip(kind.tolist(), rows.tolist(), strict=True)])
            x = (x + 0.03 * torch.randn(x.shape, generator=draw.generator("noise"))).clamp(-1, 1)
            logits = net(x)
            return torch.stack([F.cross_entropy(logits[name], examples.labels[name][rows]) for name in READ]).sum()

        steps = context.count(STEPS, 3)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1.0, weight_decay=0.01, fused=True)
        fit(Player(loss, optimizer, net, schedule=lambda s: 2e-3 * min(1, (s + 1) / 50) * (1 - s / steps)), steps)
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.save_tensors(kept, net.state_dict())
        return net.eval().requires_grad_(False)

    return context.once(f"probe {','.join(styles)}", trained)


def probe_of(context: Context, styles: Sequence[str] = ()) -> Callable[[Tensor], dict[str, Tensor]]:
    """The trained probe: pictures (b 3 h w) to what it reads of each concept (b)."""
    net = trained_probe(context, styles)

    def read(pixels: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            parts = [net(chunk) for chunk in pixels.split(100)]
        return {name: torch.cat([part[name] for part in parts]).argmax(1) for name in READ}

    return read


@dataclass(frozen=True)
class Ceiling:
    """Accuracy of the probe by concept, on unseen renders and on their reconstructions."""

    renders: dict[str, float]
    reconstructions: dict[str, float]

    def text(self, *names: str) -> str:
        parts = [f"{name} {100 * self.reconstructions[name]:.0f} %" for name in names or self.renders]
        return f"a probe; on reconstructions of unseen scenes it reads {', '.join(parts)}"


def ceiling(context: Context, styles: Sequence[str] = ()) -> Ceiling:
    """The probe's accuracy, once per run."""

    def measured() -> Ceiling:
        examples, read = test_set(context), probe_of(context, styles)
        views = (examples.pixels, autoencoder(context).pictures(codes(context, "test")[0]))
        found = [{name: accuracy(read(view)[name], examples.labels[name]) for name in READ} for view in views]
        return Ceiling(*found)

    return context.once(f"ceiling {','.join(styles)}", measured)


def accuracy(said: Tensor, truth: Tensor) -> float:
    return float((said == truth).float().mean())


def over_seeds(values: Sequence[float], digits: int = 2) -> str:
    """Mean and range over seeds."""
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f} over {len(values)} seeds)"


def toy_distance(context: Context, first: Tensor, second: Tensor) -> float:
    """Frechet distance of pictures (n 3 h w) by the probe's last hidden layer; it is not called FID."""
    net = trained_probe(context)
    with torch.no_grad():
        rows = [torch.cat([net.trunk(chunk) for chunk in x.split(100)]).double().numpy() for x in (first, second)]
    return frechet(*[Moments(each.shape[1]).add(each) for each in rows])


def percent(hits: Tensor) -> str:
    return stats.share(hits.bool().numpy()).text(percent=True)
