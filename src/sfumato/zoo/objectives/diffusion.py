"""toy-sd: diffusion on latents with a small ``UNet2DConditionModel`` (Rombach et al. 2021)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from transformers import CLIPTextModel

from sfumato import registry
from sfumato.errors import BadInput
from sfumato.training.draw import Draw
from sfumato.training.losses import Noise, denoising_loss, density, min_snr
from sfumato.training.objective import save_halves, weights_in
from sfumato.training.recipe import Section
from sfumato.zoo.objectives.foreign_context import mixed
from sfumato.zoo.objectives.latent import LatentLoss, LatentModel, LatentObjective
from sfumato.zoo.objectives.sinks import sink_loss, text_sites, word_shares

PLAIN = """from diffusers import StableDiffusionPipeline

# once, for a built-in model: sfumato models $name --export $name
pipe = StableDiffusionPipeline.from_pretrained("$name")
pipe("a red ball on the grass", num_inference_steps=$steps, guidance_scale=$guidance).images[0]"""


class UNetModel(LatentModel):
    """The ``[model]`` section."""

    channels: tuple[int, ...] = (48, 96, 128)
    layers: int | tuple[int, ...] = Field(1, description="residual blocks of each level on the way down")
    heads: tuple[int, ...] = Field((2, 4, 4), description="attention heads of each level")
    groups: int = 16
    attention: tuple[bool, ...] = Field(
        (True, True, False), description="which levels attend to themselves and the text"
    )
    text_width: int = Field(128, description="features of the text tower")
    prediction: Literal["epsilon", "v_prediction"] = Field(
        "epsilon", description="what the network says: the noise, or the velocity (Salimans & Ho 2022)"
    )
    beta_end: float = Field(
        0.012,
        gt=0.001,
        lt=1,
        description="noise of the last of the 1000 steps, as Stable Diffusion's",
    )


class DiffusionLoss(LatentLoss):
    """The ``[loss]`` section."""

    min_snr: float = Field(5.0, gt=0, description="cap of the signal-to-noise weight (Hang et al. 2023)")
    structure: float = Field(
        0.0,
        ge=0,
        description="weight of the error of x0 beside it: noisy steps, where shapes are decided, count more",
    )
    timesteps: tuple[float, PositiveFloat] | None = Field(
        None,
        description="mean and deviation of logit-normal timesteps (Esser et al. 2024): more of them where the layout is"
        " decided; all alike without",
    )
    skip_dropout: tuple[float, ...] = Field(
        (),
        description="per level, the finest first: share of the training samples whose skip connections into that level"
        " are silent, so that it cannot do without what comes through the levels below; 1: they have no weights at all",
    )
    skip_dropout_from: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="place in the steps, from none (0) to pure noise (1), from which on they are silent",
    )
    sink: float = Field(
        0.0,
        ge=0,
        description="weight of a penalty on cross-attention that lies at the start and the padding (sinks.py)",
    )


class DiffusionObjective(LatentObjective):
    """Denoising score matching: the network says which noise was added, or the velocity."""

    NAME = "diffusion"
    Model: ClassVar[type[Section]] = UNetModel
    Loss: ClassVar[type[Section]] = DiffusionLoss
    plain: ClassVar[str] = PLAIN
    sampling: ClassVar[dict[str, Any]] = {"steps": 25, "guidance": 5.0, "scheduler": "ddim"}
    unet: UNet2DConditionModel

    def build(self) -> dict[str, nn.Module]:
        o: UNetModel = self.model_options
        down = ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in o.attention]
        up = ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(o.attention)]
        channels, side = self.latent_shape()
        self.unet = UNet2DConditionModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            block_out_channels=o.channels,
            layers_per_block=o.layers,
            cross_attention_dim=o.text_width,
            attention_head_dim=o.heads,  # by this name diffusers means the number of heads
            norm_num_groups=o.groups,
        )
        # every residual branch starts at zero, as in the original U-Net
        for name, module in self.unet.named_modules():
            if name.endswith(("conv2", "proj_out", "conv_out")):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        self.cut_skips()
        self.noise_schedule = DDPMScheduler(**self.schedule())
        self.build_text()
        width = self.aligned_block().resnets[-1].out_channels
        parts: dict[str, nn.Module] = {"unet": self.unet, **self.build_readout(width)}
        # the pipeline has no use for the projection
        return {**parts, "text": self.text.text_model} if o.text_rate else parts

    def schedule(self) -> dict[str, Any]:
        """The noise, as diffusers' schedulers are told: Stable Diffusion's, but for its end."""
        o: UNetModel = self.model_options
        betas = {"beta_start": 0.00085, "beta_end": o.beta_end, "beta_schedule": "scaled_linear"}
        return {**betas, "num_train_timesteps": 1000, "prediction_type": o.prediction}

    def takes_muon(self, name: str, parameter: Tensor) -> bool:
        ends = ("conv_in", "conv_out", "time_embedding", "norm", "embeddings", "readout")
        return parameter.ndim in (2, 4) and not any(end in name for end in ends)

    def network_input(self, noisy: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What the network is shown (b, c', h, w) of a batch whose noisy latents are ``noisy`` (b, c, h, w)."""
        return noisy

    def cut_skips(self) -> None:
        """Sets the weights that read skip connections to zero where these are always silent (``skip_dropout`` of 1);
        silent in training, they stay so.

        Raises:
            BadInput: a group of a normalisation would hold such a skip connection and other features.
        """
        widths = [*self.unet.config.block_out_channels[::-1]]
        shares = [*self.loss_options.skip_dropout, *[0.0] * len(widths)][: len(widths)]
        shares.reverse()  # as the blocks: coarsest first
        for block, below, share in zip(self.unet.up_blocks, [widths[0], *widths], shares, strict=False):
            for resnet in block.resnets if share == 1 else ():
                own = below if resnet is block.resnets[0] else resnet.out_channels  # skip channels lie behind these
                if own % (resnet.norm1.num_channels // resnet.norm1.num_groups):
                    raise BadInput(
                        f"recipe key model.groups: {resnet.norm1.num_groups} groups of {resnet.norm1.num_channels}"
                        f" channels do not part after {own}, where a silent skip connection begins."
                    )
                for layer in (resnet.conv1, resnet.conv_shortcut):
                    with torch.no_grad():
                        layer.weight[:, own:] = 0

    @contextlib.contextmanager
    def dropping(self, draw: Draw, times: Tensor) -> Iterator[None]:
        """Within: skip connections are dropped for some samples of a batch, at ``times`` (b) of the steps, in training
        only (``skip_dropout``)."""
        handles, noisy = [], times >= self.loss_options.skip_dropout_from
        if self.unet.training:
            ups = reversed(self.unet.up_blocks)  # the finest level first
            for level, (block, share) in enumerate(zip(ups, self.loss_options.skip_dropout, strict=False)):
                generator = draw.generator(f"skips{level}")

                def drop(_: Any, args: Any, kwargs: dict[str, Any], share: float = share, g: Any = generator) -> Any:
                    skips = kwargs["res_hidden_states_tuple"]
                    silent = torch.rand(len(skips[0]), generator=g).to(noisy.device) < share
                    kept = (~(silent & (noisy | (share == 1)))).to(skips[0])[:, None, None, None]
                    return args, {**kwargs, "res_hidden_states_tuple": tuple(skip * kept for skip in skips)}

                handles.append(block.register_forward_pre_hook(drop, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def aligned_block(self) -> nn.Module:
        """Whose features the alignment losses read: the coarsest level's for REPA, what the last block starts from, at
        the size of the latents, for the truth."""
        ups = self.unet.up_blocks
        return self.unet.mid_block if self.loss_options.repa or len(ups) == 1 else ups[-2]

    def loss(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        x0, noise = batch["x0"], batch["noise"]
        steps = self.noise_schedule.config.num_train_timesteps
        t = (self.times(self.quantiles(len(x0), draw)) * steps).long().to(x0.device)
        context = self.text.text_model(batch["tokens"]).last_hidden_state
        if self.unet.training and "foreign" in batch:
            foreign = self.text.text_model(batch["foreign"]).last_hidden_state
            context = mixed(batch["tokens"], batch["foreign"], context, foreign)
        block = self.aligned_block()
        path = Noise(self.noise_schedule)
        snr = path.snr(t)
        weight = min_snr(snr, self.loss_options.min_snr, path.kind)
        # of the error of x0; an error of the noise grows beyond bounds where there is nothing else
        weight = weight + self.loss_options.structure / (snr.clamp(min=0.05) if path.kind == "epsilon" else snr + 1)
        places = self.place_weights(batch, snr / (snr + 1))
        shares: list[Tensor] = []
        with contextlib.ExitStack() as within:
            outputs = within.enter_context(self.watching(block))
            within.enter_context(self.dropping(draw, t / steps))
            if self.loss_options.sink:
                words = ~torch.isin(batch["tokens"], torch.tensor(self.tokenizer.all_special_ids).to(x0.device))
                shares = within.enter_context(word_shares(text_sites(self.unet), words))
            found = denoising_loss(
                lambda x, t: self.unet(self.network_input(x, batch), t, context).sample,
                path, x0, noise, t, mask=places, weight=weight,
            )  # fmt: skip
        halves = {"late": found.errors[t >= steps // 2], "early": found.errors[t < steps // 2]}
        logs = {name: half.mean().detach() for name, half in halves.items() if len(half)}
        loss = logs["denoise"] = found.loss
        if self.loss_options.align:
            logs["align"] = self.alignment(outputs[0].permute(0, 2, 3, 1), batch["places"]).mean()
            loss = loss + self.loss_options.align * logs["align"]
        if self.loss_options.repa:
            logs["repa"] = self.repa(outputs[0].permute(0, 2, 3, 1), batch, places)
            loss = loss + self.loss_options.repa * logs["repa"]
        if self.loss_options.sink:
            logs["sink"] = sink_loss(shares)
            loss = loss + self.loss_options.sink * logs["sink"]
        return loss, {key: value.detach() for key, value in logs.items()}

    def times(self, quantiles: Tensor) -> Tensor:
        """Timesteps in [0, 1) at quantiles of their distribution."""
        chosen = self.loss_options.timesteps
        return quantiles if chosen is None else density(quantiles, "logit_normal", *chosen)

    def timestep(self, quantile: float) -> float:
        steps = self.noise_schedule.config.num_train_timesteps
        if quantile in (0.0, 1.0):
            return quantile * steps
        return steps * float(self.times(torch.tensor(quantile, dtype=torch.float64)))

    def pipeline(self) -> StableDiffusionPipeline:
        text = CLIPTextModel(self.text.config)
        text.load_state_dict(self.text.text_model.state_dict())
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=text.to(self.device).eval(),
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DDIMScheduler(**self.schedule(), clip_sample=False, set_alpha_to_one=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def export(self, folder: Path) -> dict[str, Any]:
        save_halves(self.pipeline(), folder)
        return self.facts()

    def load(self, folder: Path) -> None:
        self.take(weights_in(folder, UNet2DConditionModel, subfolder="unet"))
        self.text.text_model.load_state_dict(weights_in(registry.part(folder, "text_encoder"), CLIPTextModel))

    def take(self, weights: dict[str, Tensor]) -> None:
        """Starts the U-Net from these weights."""
        self.unet.load_state_dict(weights)
