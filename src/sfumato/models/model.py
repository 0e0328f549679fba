"""`Model`: one face over the diffusers families - codec, text encoders, denoiser and schedule of one checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import valid
from sfumato.arrays import to_pixels
from sfumato.errors import BadInput
from sfumato.models import chunks, codec
from sfumato.models.condition import Condition, Encoding, TruncatedPrompt
from sfumato.models.families import Family, TextStream, family_of
from sfumato.models.quiet import quiet
from sfumato.models.schedulers import deterministic, is_flow, kind_of, make_scheduler, scheduler_names
from sfumato.models.site import Layer, Site
from sfumato.models.weights import hash_files, hash_modules


class Model:
    """A loaded checkpoint. ``pipe`` is the genuine diffusers pipeline; nothing in it is wrapped or replaced.

    Weights are frozen and in evaluation mode when they come from `load`; gradients with respect to latents and
    conditions flow, since nothing here runs under ``no_grad``. Wrap calls in ``torch.no_grad()`` where none is wanted.
    """

    def __init__(
        self,
        pipe: Any,
        name: str | None = None,
        *,
        revision: str | None = None,
        card: dict[str, Any] | None = None,
        files: Sequence[tuple[str, Path]] = (),
        family: type[Family] | None = None,
    ):
        """``card``: content of the folder's ``sfumato.json``; ``files``: (component, weight file) pairs for the hash;
        ``family``: what the pipeline is to be taken for, by default what its class is known as.

        Raises `NotSupported` for a pipeline of an unknown family.
        """
        self.pipe = pipe
        self.card = card or {}
        self.name = name or type(pipe).__name__
        self.revision = revision
        self._files = tuple(files)
        self._listeners: list[Callable[[Any], None]] = []
        self._chunks: int | None = None
        self._references: dict[str, Tensor] = {}  # states (1 ...) of reference pictures
        own = self.card.get("sampling", {})
        family = family or family_of(type(pipe).__name__, getattr(pipe, "config", None))
        self.family: Family = family(pipe, own.get("max_sequence_length"))

    def __repr__(self) -> str:
        h, w = self.default_size
        return f"Model({self.name!r}, family={self.family.name}, {w}x{h}, {self.dtype}, {self.device})"

    # --- facts -------------------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> nn.Module:
        """The U-Net or transformer."""
        return self.family.denoiser

    @property
    def dtype(self) -> torch.dtype:
        return self.family.denoiser.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """In which states are kept between steps; some pipelines keep latents of a bfloat16 model in float32."""
        return self.family.state_dtype

    @property
    def device(self) -> torch.device:
        return self.family.device

    @property
    def flow(self) -> bool:
        """Whether the model was trained by flow matching (else by diffusion, or to draw in another way)."""
        scheduler = getattr(self.pipe, "scheduler", None)
        return scheduler is not None and is_flow(scheduler)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the denoiser (Flux-dev, LCM) rather than a mix of two branches."""
        return self.family.embeds_guidance

    @property
    def defaults(self) -> dict[str, Any]:
        """``steps``, ``guidance``, ``scheduler``, and of clips ``frames`` and ``fps``, by default: the model
        card's, else the pipeline's."""
        return {"scheduler": None, **self.family.defaults, **self.card.get("sampling", {})}

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = self.card.get("sampling", {}).get("size")
        return (int(size[0]), int(size[1])) if size else self.family.default_size

    @property
    def clips(self) -> bool:
        """Whether the model makes clips of several frames rather than pictures."""
        return self.family.has("clips")

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be divisible by this."""
        return self.family.size_multiple

    @property
    def tokenizers(self) -> list[TextStream]:
        """Tokenizers whose tokens attention sees, with their place on its text axis."""
        return chunks.laid_out(self.family.streams, self._chunks)

    @property
    def text_length(self) -> int:
        """``t``: length of the text axis in attention; of texts of one chunk, unless :meth:`in_chunks` says more."""
        window = next((stream.window for stream in self.family.streams if stream.window), 0)
        return self.family.text_length + max((self._chunks or 1) - 1, 0) * window

    @property
    def layers(self) -> list[Layer]:
        """Blocks of the denoiser whose features can be read, in the order of execution."""
        return self.family.layers

    @property
    def bottleneck(self) -> Layer | None:
        """The block whose output is the h-space of a U-Net; ``None`` where there is none."""
        return self.family.bottleneck

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks of the pipeline by component name."""
        return {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}

    @cached_property
    def weight_hash(self) -> str:
        """SHA-256 (hex) over names, dtypes, shapes and bytes of all tensors; of the files where there are any.

        It does not depend on the order of tensors, on metadata or on how they are spread over files.
        """
        return hash_files(self._files) if self._files else hash_modules(self.modules)

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """Shape of one sample's state, (c, h, w) for latents of a picture, (c, f, h, w) for those of a clip. Raises
        `BadInput` for a size or a number of frames the model cannot make."""
        return self.family.state_shape(*self.grid(height, width), self.frames(frames) or 1)

    def frames(self, frames: int | None = None) -> int | None:
        """``frames`` of a clip, by default the model's own number; None for models of pictures. Raises `BadInput` for a
        number the model cannot make."""
        if not self.clips:
            if frames is not None:
                raise BadInput(f"frames={frames!r}, but {self.name} makes pictures, not clips.")
            return None
        most = self.family.frames_limit
        if frames is None:
            return min(int(self.defaults["frames"]), most or int(self.defaults["frames"]))
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1 or (most and frames > most):
            raise BadInput(f"frames={frames!r} does not fit {self.name}: give 1 to {most or 'as many as you like'}.")

        def fits(count: int) -> bool:
            return self.family.frames_of(self.family.states_of(count)) == count

        if not fits(frames):
            near = [next(filter(fits, counts), None) for counts in (range(frames, 0, -1), range(frames, 16 * frames))]
            listed = " or ".join(str(count) for count in near if count is not None)
            raise BadInput(f"frames={frames} does not fit {self.name}, which compresses time. Nearest: {listed}.")
        return frames

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the latents or tokens of a picture of this size in pixels. Raises `BadInput` for a size the model
        cannot make."""
        multiple = self.size_multiple
        for side, value in (("height", height), ("width", width)):
            if isinstance(value, bool) or not isinstance(value, int) or value < multiple or value % multiple:
                raise BadInput(
                    f"{side}={value!r} does not fit {self.name}: give a positive multiple of {multiple} pixels."
                )
            if self.family.size_limit is not None and value > self.family.size_limit:
                raise BadInput(f"{side}={value} is too long for {self.name}: {self.family.size_limit} pixels at most.")
        return height // self.family.scale, width // self.family.scale

    def sites(
        self,
        height: int | None = None,
        width: int | None = None,
        text_length: int | None = None,
        frames: int | None = None,
    ) -> list[Site]:
        """Attention sites of one denoiser call for a picture of this size in pixels, or for a clip of so many frames,
        in the order of execution."""
        h, w = self.grid(*self._size(height, width))
        text = self.text_length if text_length is None else text_length
        return list(self.family.sites(h, w, text, self.frames(frames) or 1))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Model:
        """Move the whole pipeline; returns self."""
        with quiet():
            self.pipe.to(**{k: v for k, v in (("device", device), ("dtype", dtype)) if v is not None})
        return self

    # --- text --------------------------------------------------------------------------------------------------------

    def encode_text(
        self,
        prompts: str | Sequence[str],
        negative: str | Sequence[str] | None = None,
        guidance: bool = True,
        embedded_guidance: float | None = None,
    ) -> Condition:
        """The condition of one sample per prompt, exactly as the pipeline encodes it.

        ``guidance``: also encode the unconditional branch, from ``negative`` or from what the family uses for "nothing"
        (an empty prompt; zeros for SDXL). ``embedded_guidance`` is the scale given to a guidance-distilled denoiser and
        ignored by all others. Texts longer than CLIP's window are read in chunks, all in as many as the longest takes
        (:meth:`in_chunks` says otherwise). Warns `TruncatedPrompt`, quoting what does not fit. Raises `BadInput`.
        """
        texts = valid.texts(prompts, "prompts")
        negatives = None if negative is None else valid.texts(negative, "negative")
        if negatives is not None and len(negatives) != len(texts):
            if len(negatives) > 1:
                raise BadInput(f"negative has {len(negatives)} entries for {len(texts)} prompts; give one or as many.")
            negatives *= len(texts)
        with quiet():
            parts = self.chunks_for(texts + (negatives or []))
        with self.in_chunks(parts):
            for text in texts + (negatives or []):
                self._warn_truncation(text)
        with quiet():
            cond, uncond = chunks.encode(self.family, texts, negatives, guidance, parts)
        for rows in (cond, uncond or {}):
            rows.update(
                {key: state.repeat(len(texts), *[1] * (state.dim() - 1)) for key, state in self._references.items()}
            )
        return Condition(
            cond=cond,
            uncond=uncond,
            prompts=tuple(texts),
            negatives=None if negatives is None else tuple(negatives),
            guidance=embedded_guidance if self.embeds_guidance else None,
        )

    @contextmanager
    def encoding(self, encoding: Encoding) -> Iterator[None]:
        """Within: all texts are encoded so, and conditions hold the reference pictures. Raises what `encode_image`
        does."""
        fitted = [self.family.fit_reference(picture) for picture in encoding.references]
        for given, picture in zip(encoding.references, fitted, strict=True):
            if min(picture.size) < (least := self.size_multiple):
                size = f"{given.width}x{given.height}"
                raise BadInput(f"reference is {size}; {self.name} looks at pictures of at least {least}x{least}.")
        references = {f"reference {i}": self.encode_image(to_pixels([picture])) for i, picture in enumerate(fitted)}
        before = self.family.encoding, self._references
        self.family.encoding, self._references = encoding, references
        try:
            yield
        finally:
            self.family.encoding, self._references = before

    def chunks_for(self, texts: Sequence[str]) -> int:
        """In how many chunks ``texts`` are read: as many as the longest takes, unless :meth:`in_chunks` says otherwise;
        1 where the model reads none. Raises `BadInput` for a text of more than any model attends to."""
        return chunks.needed(self.family.streams, texts) if self._chunks is None else self._chunks

    @contextmanager
    def in_chunks(self, number: int | None) -> Iterator[None]:
        """Within: every text is read in so many chunks and the text axis is as long; 0: what does not fit into one
        window is cut off, as diffusers does; None: each call takes as many as its texts need."""
        before, self._chunks = self._chunks, number
        try:
            yield
        finally:
            self._chunks = before

    def _warn_truncation(self, text: str) -> None:
        for stream in self.tokenizers:
            with quiet():
                dropped = chunks.unseen(stream, text)
            if not dropped:
                continue
            shown = dropped if len(dropped) <= 80 else f"{dropped[:38]} ... {dropped[-37:]}"
            warnings.warn(
                f"{self.name} reads {stream.length} tokens of {stream.name} text and does not see {shown!r}.",
                TruncatedPrompt,
                stacklevel=3,
            )

    # --- denoiser ----------------------------------------------------------------------------------------------------

    def calls(self, branches: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Which guidance branches go into which denoiser call, in the pipeline's order.

        One call for both with most families; Flux runs them one by one, the conditional first.
        """
        ordered = tuple(sorted(branches, key=self.family.branch_order.index))
        return (ordered,) if self.family.joint_branches else tuple((name,) for name in ordered)

    def predict(
        self,
        x: Tensor,
        t: Tensor | float,
        condition: Condition,
        branches: str | Sequence[str] | None = None,
        **extra: Any,
    ) -> Tensor:
        """One denoiser call: its raw output (epsilon, v, velocity or logits).

        ``x`` (b ..., such as b c h w) has one row per sample and is repeated for each branch, or already holds
        branches * b rows; it must have been through the scheduler's ``scale_model_input`` where there is one. ``t`` is
        a value of ``scheduler.timesteps``, or one per sample. Returns branches * b rows, branch after branch, in the
        layout of the latents (logits of tokens: see the family); by default for all branches of the condition.
        ``extra`` goes to the denoiser's forward. Raises `BadInput` for other shapes.
        """
        self.announce(t)
        names = (branches,) if isinstance(branches, str) else tuple(branches or condition.branches)
        samples, rows = len(condition), len(names) * len(condition)
        if x.ndim != self.family.state_dims or x.shape[0] not in (samples, rows):
            raise BadInput(
                f"x has shape {tuple(x.shape)}; expected (b {self.family.state}) with {samples} or {rows} rows."
            )
        if x.shape[0] != rows:
            x = torch.cat([x] * len(names))
        time = torch.as_tensor(t, device=x.device)
        if time.ndim and time.shape[0] not in (1, rows):
            time = time.repeat(len(names))
        return self.family.predict(x, time, condition.batch(names), condition.guidance, extra)

    def announce(self, t: Any) -> None:
        """Tell those who listen that a denoiser call at timestep ``t`` comes next."""
        for listener in self._listeners:
            listener(t)

    @contextmanager
    def listening(self, listener: Callable[[Any], None]) -> Iterator[None]:
        """Within: ``listener(t)`` is called before every denoiser call, with its timestep or timesteps."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    # --- schedule ----------------------------------------------------------------------------------------------------

    def make_scheduler(self, name: Any = None) -> Any:
        """A fresh scheduler: like the pipeline's own (``None``), by short name, or a copy of a given one.

        Raises `UnknownName`, or `NotSupported` where its path does not fit the model.
        """
        return make_scheduler(self.pipe.scheduler, name)

    @property
    def schedulers(self) -> list[str]:
        """Short names that `make_scheduler` takes for this model; none where it draws without a noise path."""
        return scheduler_names(kind_of(self.pipe.scheduler)) if self.family.has("noise_path") else []

    @property
    def deterministic_scheduler(self) -> str:
        """Short name of the plainest scheduler without fresh noise: ``"ddim"``, ``"flow_euler"`` or ``"edm_euler"``."""
        return deterministic(self.pipe.scheduler)

    def prediction(self, scheduler: Any = None) -> str:
        """What the denoiser's output means: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or ``"flow"``."""
        scheduler = self.pipe.scheduler if scheduler is None else scheduler
        return "flow" if is_flow(scheduler) else scheduler.config.get("prediction_type", "epsilon")

    def timesteps(
        self,
        scheduler: Any,
        steps: int,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        **given: Sequence[float],
    ) -> Tensor:
        """Set the scheduler up as the pipeline does, shifts by the size of pictures and clips included; returns its
        timesteps.

        ``given``: ``timesteps`` or ``sigmas`` of one's own instead of ``steps``. Raises `BadInput` where the scheduler
        cannot take them.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise BadInput(f"steps={steps!r} is not allowed: give a whole number from 1.")
        h, w = self.grid(*self._size(height, width))
        own = {name: [int(x) if float(x).is_integer() else x for x in values] for name, values in given.items()}
        if "timesteps" in own and is_flow(scheduler):
            raise BadInput(
                f"timesteps do not say how far {self.name}, a flow model, has come; give sigmas, from 1 down."
            )
        self.family.set_timesteps(scheduler, steps, h, w, self.device, self.frames(frames) or 1, **own)
        if "timesteps" in own and not set(own["timesteps"]) <= set(scheduler.timesteps.tolist()):
            raise BadInput(
                f"timesteps={own['timesteps']} cannot be kept by {type(scheduler).__name__}; give whole numbers."
            )
        return scheduler.timesteps

    def prepare(self, noise: Tensor, scheduler: Any) -> Tensor:
        """First latents of the loop from unit noise (b c h w): scaled by the scheduler's largest noise level."""
        return self.family.prepare(noise, scheduler)

    # --- codec -------------------------------------------------------------------------------------------------------

    def decode(self, state: Tensor) -> Tensor:
        """Pictures (b 3 H W) or clips (b 3 f H W), about [-1, 1] and not clamped, from final states (b ...) such as
        latents (b c h w), as the pipeline decodes them.

        Samples in which an autoencoder overflows in half precision are made once more in float32, which warns
        `codec.Overflow`. Raises `NotFinite` where that does not help, and in float32; states that are not finite
        themselves are decoded as they are.
        """
        if state.is_floating_point() and not state.isfinite().all():  # whoever made it has more to say about it
            return self.family.decode(state)
        return codec.finite(self._autoencoder, lambda rows: self.family.decode(state[rows]), "decoded", self.name)

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """States (b ...) such as latents (b c h w) of pictures (b 3 H W), or of clips (b 3 f H W), in [-1, 1].

        The posterior's mean, or a draw from it with one CPU generator per picture. Raises `BadInput` for other shapes,
        `NotSupported` where the model reads no pictures, `NotFinite` as `decode`.
        """
        letters = "b 3 f H W" if self.clips else "b 3 H W"
        if images.ndim != len(letters.split()) or images.shape[1] != 3:
            raise BadInput(f"images have shape {tuple(images.shape)}; expected ({letters}).")
        self.latent_shape(images.shape[-2], images.shape[-1], images.shape[2] if self.clips else None)
        if generators is not None and len(generators) != len(images):
            raise BadInput(f"generators has {len(generators)} entries for {len(images)} images; give one for each.")
        own = codec.same_draws(generators, len(images))

        def encode(rows: codec.Which) -> Tensor:
            return self.family.encode_image(images[rows].to(self.device), own(rows))

        encoded = codec.finite(self._autoencoder, encode, "encoded", self.name)
        return encoded.to(self.state_dtype) if encoded.is_floating_point() else encoded

    @property
    def _autoencoder(self) -> Any:
        return next((part for name in ("vae", "vqvae") if (part := getattr(self.pipe, name, None)) is not None), None)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        default = self.default_size
        return height or default[0], width or default[1]
