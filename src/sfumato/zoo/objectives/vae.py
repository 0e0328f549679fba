"""The autoencoder: a small ``diffusers.AutoencoderKL`` (Rombach et al. 2021, stage 1) without an adversary."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL.Image import Image
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from sfumato import sheets
from sfumato.arrays import to_tensor
from sfumato.training import data
from sfumato.training.draw import Draw
from sfumato.training.losses import reconstruction_loss
from sfumato.training.objective import Objective, save_half
from sfumato.training.recipe import Section
from sfumato.zoo.objectives.coarse_first import coarse_first
from sfumato.zoo.objectives.silent_channels import telling, without_silent


class VAEModel(Section):
    """The ``[model]`` section."""

    channels: tuple[int, ...] = Field(
        (32, 64, 96), description="width of each level; each level after the first halves"
    )
    layers: int = Field(1, ge=1)
    latent_channels: int = Field(4, ge=1)
    groups: int = Field(8, ge=1, description="groups of the normalisations")
    strengths: tuple[PositiveFloat, PositiveFloat] | None = Field(
        None,
        description="deviations of the channels that hold what neighbouring latents share, which then come first, and"
        " of those that hold details (coarse_first.py); without, channels stay as learnt, each of deviation 1",
    )


class VAELoss(Section):
    """The ``[loss]`` section: weights of the terms, all means over elements."""

    l1: float = Field(1.0, ge=0)
    l2: float = Field(1.0, ge=0)
    edge: float = Field(0.5, ge=0, description="L1 of the differences between neighbouring pixels")
    kl: float = Field(1e-4, ge=0, description="KL to the unit normal, per latent element")
    toy_weight: float = Field(3.0, gt=0, description="weight of toy pixels beside background pixels")
    decoder_only: bool = Field(False, description="leave the latents as they are and train only what reads them")
    crop: int = Field(0, ge=0, description="train on random crops of this side, 0 = whole pictures")
    scale: float = Field(
        0.0,
        ge=0,
        description="weight of reading latents at half size as the picture at half size (Kouzelis et al. 2025, EQ-VAE):"
        " latents that scale as pictures do are easier to denoise",
    )


class VAEObjective(Objective):
    """Reconstruction of toybox pictures; exported without silent channels, the others' latents standardised."""

    NAME = "vae"
    EXPORTED = "vae"
    Model: ClassVar[type[Section]] = VAEModel
    Loss: ClassVar[type[Section]] = VAELoss
    vae: AutoencoderKL

    def build(self) -> dict[str, nn.Module]:
        o: VAEModel = self.model_options
        n = len(o.channels)
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * n,
            up_block_types=("UpDecoderBlock2D",) * n,
            block_out_channels=o.channels,
            layers_per_block=o.layers,
            latent_channels=o.latent_channels,
            norm_num_groups=o.groups,
            sample_size=self.recipe.data.size,
            mid_block_add_attention=False,
            scaling_factor=1.0,
            shift_factor=0.0,
        )
        if self.loss_options.decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        return {"vae": self.vae}

    def batch(self, draw: Draw) -> dict[str, Tensor]:
        o: VAELoss = self.loss_options
        indices = draw.indices(len(self.train_data), self.recipe.train.batch)
        x = data.pictures(self.train_data, indices)
        weight = data.toy_weights(self.train_data, indices, o.toy_weight)
        generator = draw.generator("augment")
        both = torch.cat([x, weight], 1)
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        both[mirrored] = both[mirrored].flip(-1)
        if o.crop:
            corner = torch.randint(0, x.shape[-1] - o.crop + 1, (len(x), 2), generator=generator).tolist()
            both = torch.stack([b[:, i : i + o.crop, j : j + o.crop] for b, (i, j) in zip(both, corner, strict=True)])
        f = 2 ** (len(self.model_options.channels) - 1)
        shape = (len(x), self.model_options.latent_channels, both.shape[-2] // f, both.shape[-1] // f)
        return {"x": both[:, :3], "weight": both[:, 3:], "noise": torch.randn(shape, generator=draw.generator("noise"))}

    def loss(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        o: VAELoss = self.loss_options
        x, weight = batch["x"], batch["weight"]
        if self.recipe.train.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * batch["noise"]
        error = self.vae.decode(z).sample.float() - x
        loss, logs = reconstruction_loss(error, weight, posterior, o)
        if o.scale:
            small = self.vae.decode(F.avg_pool2d(z, 2)).sample.float() - F.avg_pool2d(x, 2)
            scaled = (F.avg_pool2d(weight, 2) * (o.l1 * small.abs() + o.l2 * small.square())).mean()
            loss = loss + o.scale * scaled
            logs["scale"] = scaled.detach()
        return loss, logs

    def reconstruct(self, x: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) through the autoencoder by the posterior mean, clamped to [-1, 1]."""
        return self.vae.decode(self.vae.encode(x).latent_dist.mean).sample.float().clamp(-1, 1)

    def evaluate(self, n: int = 256) -> dict[str, float]:
        error, toys = [], []
        for part in torch.arange(min(n, len(self.val_data))).split(32):
            x = data.pictures(self.val_data, part).to(self.device)
            error.append((self.reconstruct(x) - x).square().mean(1) / 4)
            toys.append(to_tensor(self.val_data.masks[part.numpy()] >= 0).to(self.device))
        error, toys = torch.cat(error), torch.cat(toys)
        per_picture = -10 * torch.log10(error.mean((1, 2)))
        figures = {"psnr": per_picture, "psnr_pooled": -10 * torch.log10(error.mean())}
        if toys.any():
            figures["psnr_toys"] = -10 * torch.log10(error[toys].mean())
        return {name: float(value.mean()) for name, value in figures.items()}

    def grid(self) -> Image:
        x = data.pictures(self.val_data, torch.arange(min(8, len(self.val_data)))).to(self.device)
        return sheets.sheet(torch.cat([x, self.reconstruct(x)]), len(x), scale=2, gap=0)

    def standardised(self, n: int = 512) -> tuple[AutoencoderKL, dict[str, Any]]:
        """The autoencoder without silent channels, the mean of the latents and a map of their channels folded into the
        1x1 convolutions on either side of them; and what was found.

        Its latents have mean 0 and deviation 1 in every channel, or the order and ``strengths`` of the recipe;
        reconstructions are unchanged.
        """
        said = [
            self.vae.encode(data.pictures(self.train_data, part).to(self.device)).latent_dist
            for part in torch.arange(min(n, len(self.train_data))).split(32)
        ]
        z, logvar = torch.cat([one.mean for one in said]), torch.cat([one.logvar for one in said])
        mean, std, keep = z.mean((0, 2, 3)), z.std((0, 2, 3)), telling(z, logvar)
        facts: dict[str, Any] = {"mean": mean.tolist(), "std": std.tolist(), "silent": int((~keep).sum())}
        vae = without_silent(self.vae, keep, mean)
        z, logvar, mean, std = z[:, keep], logvar[:, keep], mean[keep], std[keep]
        c, inner, outer = len(mean), vae.quant_conv, vae.post_quant_conv
        if self.model_options.strengths is None:
            turn = torch.diag(1 / std)
            inner.bias[c:] -= 2 * std.log()
        else:
            found, facts["coarse"] = coarse_first(z - mean[:, None, None], *self.model_options.strengths)
            turn = found.to(mean)
            # of turned posteriors what is left is how uncertain a channel is as a rule
            inner.weight[c:] = 0
            inner.bias[c:] = (turn.square() @ logvar.mean((0, 2, 3)).exp()).log()
        inner.weight[:c] = torch.einsum("ij,jkhw->ikhw", turn, inner.weight[:c])
        inner.bias[:c] = turn @ (inner.bias[:c] - mean)
        outer.bias += outer.weight[:, :, 0, 0] @ mean
        outer.weight[:] = torch.einsum("ijhw,jk->ikhw", outer.weight, torch.linalg.inv(turn.double()).to(turn))
        return vae, facts

    def export(self, folder: Path) -> dict[str, Any]:
        if self.loss_options.decoder_only:
            return super().export(folder)
        vae, facts = self.standardised()
        save_half(vae, folder)
        return {"latents_before_standardising": facts}
