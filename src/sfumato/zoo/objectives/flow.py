"""toy-sd3: rectified flow on latents with a small ``SD3Transformer2DModel`` (Esser et al. 2024)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from sfumato import registry
from sfumato.training.draw import Draw
from sfumato.training.losses import Flow, denoising_loss, density
from sfumato.training.objective import save_halves, weights_in
from sfumato.training.recipe import Section
from sfumato.zoo.objectives.foreign_context import mixed
from sfumato.zoo.objectives.latent import LatentLoss, LatentModel, LatentObjective

# the third text encoder is absent, which diffusers wants to be encoded
PLAIN = """from diffusers import StableDiffusion3Pipeline

# once, for a built-in model: sfumato models $name --export $name
pipe = StableDiffusion3Pipeline.from_pretrained("$name", text_encoder_3=None, tokenizer_3=None)
pipe("a red ball on the grass", num_inference_steps=$steps, guidance_scale=$guidance, \
max_sequence_length=0).images[0]"""


class FlowModel(LatentModel):
    """The ``[model]`` section."""

    layers: int = Field(6, ge=1)
    heads: int = Field(5, ge=1)
    head_width: int = Field(32, ge=8)
    patch: int = 2
    text_width: int = Field(128, description="features of the text tower, which is used as both CLIP encoders")
    largest: int = Field(24, description="side of the position grid in patches: the largest picture the model can make")
    shift: float = Field(
        1.0,
        gt=0,
        description="of the timesteps in drawing (Esser et al. 2024, equation 23): above 1 more of them noisy",
    )


class FlowLoss(LatentLoss):
    """The ``[loss]`` section."""

    mean: float = Field(0.0, description="mean of the logit-normal timesteps")
    deviation: float = Field(1.0, gt=0, description="deviation of the logit-normal timesteps")


class FlowObjective(LatentObjective):
    """Conditional flow matching: x_t = (1 - t) x0 + t eps, the network predicts eps - x0; t from a logit-normal."""

    NAME = "flow"
    Model: ClassVar[type[Section]] = FlowModel
    Loss: ClassVar[type[Section]] = FlowLoss
    plain: ClassVar[str] = PLAIN
    sampling: ClassVar[dict[str, Any]] = {
        "steps": 25,
        "guidance": 3.0,
        "scheduler": "flow_euler",
        "max_sequence_length": 0,
    }
    transformer: SD3Transformer2DModel

    def build(self) -> dict[str, nn.Module]:
        o: FlowModel = self.model_options
        channels, side = self.latent_shape()
        self.transformer = SD3Transformer2DModel(
            sample_size=side,
            patch_size=o.patch,
            in_channels=channels,
            out_channels=channels,
            num_layers=o.layers,
            attention_head_dim=o.head_width,
            num_attention_heads=o.heads,
            joint_attention_dim=2 * o.text_width,
            caption_projection_dim=o.heads * o.head_width,
            pooled_projection_dim=2 * o.text_width,
            pos_embed_max_size=o.largest,
            qk_norm="rms_norm",
        )
        # modulation and the last projection start at zero (adaLN-Zero, Peebles and Xie 2022)
        for name, module in self.transformer.named_modules():
            if name == "proj_out" or (name.endswith(".linear") and "norm" in name):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        self.build_text()
        self.align_cell = o.patch
        parts: dict[str, nn.Module] = {"transformer": self.transformer, **self.build_readout(o.heads * o.head_width)}
        return {**parts, "text": self.text} if o.text_rate else parts

    def loss(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        o: FlowLoss = self.loss_options
        x0, noise = batch["x0"], batch["noise"]
        t = self.times(self.quantiles(len(x0), draw)).to(x0.device)
        encoded = self.text(batch["tokens"], output_hidden_states=True)
        hidden, pooled = encoded.hidden_states[-2], encoded.text_embeds
        if self.transformer.training and "foreign" in batch:
            foreign = self.text(batch["foreign"], output_hidden_states=True)
            hidden = mixed(batch["tokens"], batch["foreign"], hidden, foreign.hidden_states[-2])
            pooled = foreign.text_embeds
        context, pooled = torch.cat([hidden] * 2, -1), torch.cat([pooled] * 2, -1)
        places = self.place_weights(batch, (1 - t) ** 2 / ((1 - t) ** 2 + t**2))
        block = self.transformer.transformer_blocks[len(self.transformer.transformer_blocks) // 2 - 1]
        with self.watching(block) as outputs:
            found = denoising_loss(
                lambda x, t: self.transformer(x, context, pooled, 1000 * t, return_dict=False)[0],
                Flow(), x0, noise, t, mask=places,
            )  # fmt: skip
        halves = {"late": found.errors[t >= 0.5], "early": found.errors[t < 0.5]}
        logs = {name: half.mean().detach() for name, half in halves.items() if len(half)}
        loss = logs["denoise"] = found.loss
        if o.align:
            features = outputs[0][1].unflatten(1, batch["places"].shape[-2:])  # a block returns (text, picture)
            logs["align"] = self.alignment(features, batch["places"]).mean()
            loss = loss + o.align * logs["align"]
        if o.repa:
            side = x0.shape[-1] // self.align_cell
            logs["repa"] = self.repa(outputs[0][1].unflatten(1, (side, side)), batch, places)
            loss = loss + o.repa * logs["repa"]
        return loss, {key: value.detach() for key, value in logs.items()}

    def times(self, quantiles: Tensor) -> Tensor:
        """t in (0, 1) at quantiles of the logit-normal."""
        o: FlowLoss = self.loss_options
        return density(quantiles, "logit_normal", o.mean, o.deviation)

    def timestep(self, quantile: float) -> float:
        if quantile in (0.0, 1.0):
            return 1000 * quantile
        return 1000 * float(self.times(torch.tensor(quantile, dtype=torch.float64)))

    def pipeline(self) -> StableDiffusion3Pipeline:
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self.model_options.shift),
            vae=self.vae,
            text_encoder=self.text,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text,
            tokenizer_2=self.tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )

    def export(self, folder: Path) -> dict[str, Any]:
        save_halves(self.pipeline(), folder)
        return self.facts()

    def load(self, folder: Path) -> None:
        self.transformer.load_state_dict(weights_in(folder, SD3Transformer2DModel, subfolder="transformer"))
        self.text.load_state_dict(weights_in(registry.part(folder, "text_encoder"), CLIPTextModelWithProjection))
