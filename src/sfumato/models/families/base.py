"""What every family answers. One file per family below this one knows how its diffusers pipeline feeds its denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sfumato.errors import BadInput, NotSupported
from sfumato.models import codec
from sfumato.models.condition import COND, UNCOND, Encoding, Rows
from sfumato.models.offloading import execution_device
from sfumato.models.site import Layer, Site

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class TextStream:
    """One tokenizer whose tokens are seen by attention.

    Position ``i`` of the tokenizer's padded output lies at ``offset + i`` of the text axis; two streams may share
    positions (SDXL and SD3 put the features of two CLIPs side by side). Below 0 lies what the pipeline cuts off (the
    head of a template).
    """

    tokenizer: Any
    #: ``"clip"``, ``"clip2"`` or ``"t5"``
    name: str
    offset: int
    #: number of positions, special and padding tokens included
    length: int
    #: what the pipeline does to the text before tokenizing (PixArt: lower case, stripped)
    prepare: Callable[[str], str]
    #: the tokenizer's attribute of the pipeline
    attribute: str = "tokenizer"
    #: positions of one chunk, where a longer text is read in several (:mod:`sfumato.models.chunks`)
    window: int | None = None
    #: how many chunks there are; 0 as many as a text needs
    chunks: int = 0
    #: whether texts are filled up to ``length``; else the axis is as long as the longest text of a call
    padded: bool = True
    #: whether what fills it up comes before the text
    left: bool = False


def tensors_in(given: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts, in their order."""
    if isinstance(given, Tensor):
        return [given]
    parts = given.values() if isinstance(given, dict) else given if isinstance(given, list | tuple) else ()
    return [x for part in parts for x in tensors_in(part)]


def accepted_by(function: Callable[..., Any]) -> set[str]:
    """Names of a function's parameters."""
    return set(inspect.signature(function).parameters)


def sibling_classes(pipeline: str, form: str, kinds: str, lost: str = "") -> dict[str, tuple[str, str]]:
    """Entries of :attr:`Family.siblings`: pipeline classes named as ``form`` with each of ``kinds``, made of the parts
    of ``pipeline``. ``lost``: what is not followed."""
    return {form.format(kind): (pipeline, lost) for kind in kinds.split()}


#: what siblings lose that bring something along
NO_CONTROL = "its control network is left out; to draw with it, attach systems to a pipeline of your own"
NO_PAG = "perturbed-attention guidance is not followed"
NO_PICTURE = "it draws from the text alone; a picture or clip that its pipeline would begin with is not followed"
#: what every text-to-image diffusion or flow model offers whose denoiser attends to the text
TEXT_TO_IMAGE = frozenset({"pictures", "noise_path", "differentiable_state", "text_attention"})


class Family:
    """Base class. A family is bound to one pipeline and holds no other state."""

    name: ClassVar[str]
    #: names of :data:`sfumato.cards.CAPABILITIES` that models of this family offer; see :meth:`has`
    capabilities: ClassVar[frozenset[str]]
    #: diffusers pipeline classes it serves
    pipeline_classes: ClassVar[tuple[str, ...]]
    #: attribute of the pipeline that holds the denoiser
    denoiser_name: ClassVar[str]
    #: components besides the denoiser that a whole model has; "tokenizer" stands for one or several
    components: ClassVar[tuple[str, ...]] = ("vae", "scheduler", "tokenizer")
    #: how it draws: a key of ``sfumato.sampling.process.PROCESSES``
    process: ClassVar[str] = "diffusion"
    #: einops letters of one sample's state, behind the batch axis
    state: ClassVar[str] = "c h w"
    #: steps and guidance of the pipeline's own ``__call__``
    defaults: dict[str, Any]
    #: text positions of T5-like encoders when the model's card says nothing
    max_sequence_length: int | None = None
    #: whether the pipeline feeds both guidance branches in one denoiser call
    joint_branches: ClassVar[bool] = True
    #: the order in which it feeds them
    branch_order: ClassVar[tuple[str, ...]] = (UNCOND, COND)
    #: the guidance scale up to which the unconditional branch is not run
    guidance_off: ClassVar[float] = 1.0
    #: whether checkpoints of this family are made for redrawing regions of pictures
    inpaints: ClassVar[bool] = False
    #: whether the pipeline steps with the negative of what the denoiser gives
    negates: ClassVar[bool] = False
    #: whether the pipeline brings the state back to ``state_dtype`` after every step
    casts_state: ClassVar[bool] = False
    #: half-precision in which checkpoints of this family are customarily run
    half: ClassVar[torch.dtype] = torch.float16
    #: components that read a text of several chunks once, with its first
    read_once: ClassVar[tuple[str, ...]] = ()
    #: whether the pipeline lifts a float16 autoencoder with ``force_upcast`` to float32
    upcasts_vae: ClassVar[bool] = False
    #: whether the pipeline adds the autoencoder's ``shift_factor``
    shifts_latents: ClassVar[bool] = False
    #: pipeline classes made of the same parts -> (the class that they are loaded as, what is not followed, if anything)
    siblings: ClassVar[dict[str, tuple[str, str]]] = {}
    #: settings of the pipeline that tell checkpoints of this family from others of the same class
    told_by: ClassVar[dict[str, Any]] = {}
    #: whether it only finishes pictures, or the latents of another model, and draws none from noise
    finishes: ClassVar[bool] = False
    #: how many reference pictures may be given beside a prompt; from 1 on where it cannot draw without
    references: ClassVar[range] = range(1)
    #: whether the denoiser is conditioned on the picture's original size, crop and target size
    micro_conditions: ClassVar[bool] = False
    #: whether its CLIPs' last layer but one is read where ``clip_skip`` is not given
    penultimate_clip_layer: ClassVar[bool] = False
    #: of the run in progress: see `Model.encoding`
    encoding: Encoding = Encoding()

    def __init__(self, pipe: Any, max_sequence_length: int | None = None):
        self.pipe = pipe
        if max_sequence_length is not None and self.max_sequence_length is not None:
            self.max_sequence_length = max_sequence_length

    def has(self, capability: str) -> bool:
        """Whether this very model offers a capability; a checkpoint may lack what its family usually has."""
        return capability in self.capabilities

    # --- facts -------------------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> Any:
        """The U-Net or transformer."""
        return getattr(self.pipe, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes; its weights may rest elsewhere meanwhile (offloading)."""
        first = next(self.denoiser.parameters()).device
        if first.type == "cpu" and not torch.accelerator.is_available():
            return first  # nowhere else to go: no need to look through all modules
        if (place := execution_device(self.denoiser.modules())) is not None:
            return place
        # weights at rest may belong elsewhere: diffusers looks through all modules
        return self.denoiser.device if first.type == "cpu" else first

    @property
    def config(self) -> Any:
        """The denoiser's configuration."""
        return self.denoiser.config

    @property
    def scale(self) -> int:
        """Pixels per latent or token, along one side."""
        return int(self.pipe.vae_scale_factor)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.config.in_channels)

    @property
    def state_dtype(self) -> torch.dtype:
        """In which the pipeline keeps states between steps."""
        return self.denoiser.dtype

    @property
    def state_dims(self) -> int:
        """Number of axes of a batch of states."""
        return 1 + len(self.state.split())

    def state_shape(self, h: int, w: int, frames: int = 1) -> tuple[int, ...]:
        """Shape of one sample's state where a picture's latents or tokens form a grid of h by w; of a clip of so many
        ``frames``."""
        return self.channels, h, w

    @property
    def frames_per_state(self) -> int:
        """Frames of a clip per frame of its state, beyond the first one."""
        return 1

    def frames_of(self, f: int) -> int:
        """How many frames a clip has whose state has f along its axis of frames."""
        return (f - 1) * self.frames_per_state + 1

    def states_of(self, frames: int) -> int:
        """The state's frames of a clip of so many ``frames``."""
        return (frames - 1) // self.frames_per_state + 1

    @property
    def further_channels(self) -> int:
        """How many channels the denoiser reads beside the latents, such as a mask, that the pipeline does not give."""
        config = self.pipe.vae.config
        return self.channels - int(config.get("latent_channels", config.get("z_dim", self.channels)))

    @property
    def vocabulary(self) -> int:
        """How many tokens a picture may be made of; only where the state is token ids."""
        raise NotImplementedError

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the denoiser (guidance distillation)."""
        return False

    @property
    def takes_mask(self) -> bool:
        """Whether the denoiser also sees a mask and the picture outside it (inpainting checkpoints)."""
        return False

    @property
    def size_multiple(self) -> int:
        """Picture sides must be divisible by this."""
        raise NotImplementedError

    @property
    def size_limit(self) -> int | None:
        """Longest picture side that the position embedding reaches; ``None`` where any length will do."""
        return None

    @property
    def frames_limit(self) -> int | None:
        """Most frames that a clip may have; ``None`` where any number will do. Models of pictures make none."""
        return None

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the pipeline makes by default."""
        side = self.pipe.default_sample_size * self.scale
        return side, side

    @property
    def streams(self) -> list[TextStream]:
        """Tokenizers seen by attention."""
        raise NotImplementedError

    @property
    def text_length(self) -> int:
        """``t``: positions of the text axis in attention."""
        return max((stream.offset + stream.length for stream in self.streams), default=0)

    @property
    def clip_layers(self) -> int:
        """How many of its CLIPs' last layers ``clip_skip`` may leave out; 0 where it means nothing."""
        return 0

    @property
    def layers(self) -> list[Layer]:
        """Blocks whose features can be read, in the order of execution."""
        return []

    @property
    def bottleneck(self) -> Layer | None:
        """The block between the two halves of a U-Net, whose output is the h-space; ``None`` where there is none."""
        return None

    # --- work --------------------------------------------------------------------------------------------------------

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        """Rows of the conditional and of the unconditional branch, from the pipeline's own ``encode_prompt``."""
        raise NotImplementedError

    def joined(self, chunks: Sequence[Rows]) -> Rows:
        """The rows of a text from those of its chunks: one behind the other on the text axis, all else the first's."""
        return {**chunks[0], "embeds": torch.cat([rows["embeds"] for rows in chunks], 1)}

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        """One forward pass of the denoiser on states (b ...); ``t`` is a scalar or (b,), ``rows`` has ``b`` rows."""
        raise NotImplementedError

    def decode(self, state: Tensor) -> Tensor:
        """Pictures (b 3 H W), about [-1, 1] and not clamped, from final states, as the pipeline decodes them."""
        return codec.decode(self.pipe.vae, state, self.upcasts_vae, self.shifts_latents)

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        """States of pictures (b 3 H W) in [-1, 1]; a stochastic encoder draws with one generator per picture, or gives
        its mean without."""
        return codec.encode(self.pipe.vae, images, generators, self.upcasts_vae, self.shifts_latents)

    def fit_reference(self, picture: Image) -> Image:
        """A reference picture in the size in which the pipeline encodes it."""
        raise NotImplementedError

    @staticmethod
    def references_of(rows: Rows) -> list[Tensor]:
        """The states (b ...) of the reference pictures in these rows, in their order."""
        return [rows[key] for key in map("reference {}".format, range(len(rows))) if key in rows]

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        """Attention sites for latents of h by w, ``text`` text positions and a clip of so many ``frames``, in the order
        of execution."""
        raise NotImplementedError

    def grid_of_call(self, arguments: dict[str, Any]) -> tuple[int, int, int]:
        """(frames, h, w) of the latents that somebody's call of the denoiser with these ``arguments`` works on."""
        x = self.state_of_call(arguments)
        frames = self.frames_of(x.shape[-3]) if self.state.startswith("c f") else 1
        return frames, x.shape[-2], x.shape[-1]

    def state_of_call(self, arguments: dict[str, Any]) -> Tensor:
        """The state (b ...) that such a call is given, in the pipeline's form."""
        return next(arguments[name] for name in ("sample", "hidden_states", "input_ids") if name in arguments)

    def rows_of_call(self, arguments: dict[str, Any]) -> Rows:
        """What such a call says of the texts: ``embeds`` (b t d), and ``mask`` (b t) where it has one."""
        embeds = arguments["encoder_hidden_states"]
        masks = (arguments.get(f"encoder_{name}") for name in ("attention_mask", "hidden_states_mask"))
        mask = next((each for each in masks if each is not None), None)
        return {"embeds": embeds} if mask is None else {"embeds": embeds, "mask": mask}

    def call_with(self, arguments: dict[str, Any], embeds: Tensor) -> dict[str, Any]:
        """The arguments of such a call with other ``embeds`` (b t d) in place of its own."""
        return {**arguments, "encoder_hidden_states": embeds}

    def texts_of_encoding(self, result: Any) -> list[Tensor]:
        """The texts (b t d) in what ``encode_prompt`` gave: the prompt's, then further ones."""
        return [x for x in tensors_in(result) if x.dim() == 3 and x.is_floating_point()]

    def unpacked(self, x: Any, h: int, w: int) -> Tensor:
        """States (b ...) of h by w from the form in which the pipeline carries them, or its denoiser gives them."""
        return x

    def text_in(self, rows: Rows) -> int:
        """``t`` of a denoiser call with these rows."""
        return int(rows["embeds"].shape[1])

    def places(self, rows: Rows, site: Site) -> Tensor | None:
        """Where the positions of a site's sequence lie in a call with these rows (b n), for networks that pack each
        sample in its own way; None where all lie as the site says. Sites of one kind and image range share the
        answer, which is asked for once a call."""
        return None

    def combine(self, uncond: Tensor, conds: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """What the pipeline's guidance makes of the outputs (b ...) without text, and with one text or several.

        ``u + sum_i w_i (c_i - u)``: classifier-free guidance for one, composable diffusion for several.
        """
        guided = uncond
        for cond, weight in zip(conds, weights, strict=True):
            guided = guided + weight * (cond - uncond)
        return guided

    def set_timesteps(
        self, scheduler: Any, steps: int, h: int, w: int, device: torch.device, frames: int = 1, **given: list[float]
    ) -> None:
        """Prepare the scheduler as the pipeline does, for latents of h by w of a clip of so many ``frames``. ``given``:
        ``timesteps`` or ``sigmas`` of one's own, which count instead of ``steps``. Raises `BadInput` where the
        scheduler takes no such thing."""
        self._set(scheduler, steps, device, given)

    def noise(self, generators: Sequence[torch.Generator], h: int, w: int, frames: int) -> Tensor:
        """Unit noise (b ...) in the shape of the state, each sample from its own generator, as the pipeline draws
        it."""
        return self._drawn(generators, self.state_shape(h, w, frames))

    def _drawn(self, generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(
            (len(generators), *shape), generator=list(generators), device=self.device, dtype=self.state_dtype
        )

    def prepare(self, noise: Tensor, scheduler: Any) -> Tensor:
        """First latents of the loop from unit noise."""
        return noise * scheduler.init_noise_sigma

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _stream(
        self, attribute: str, name: str, offset: int, length: int | None = None, chunked: bool = False
    ) -> list[TextStream]:
        """The stream of one tokenizer of the pipeline; none where the pipeline lacks it. ``chunked``: longer texts are
        read in chunks, which takes a tokenizer that reports character offsets."""
        tokenizer = getattr(self.pipe, attribute)
        if tokenizer is None:
            return []
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        if not any(token.endswith("_1") for token in tokenizer.added_tokens_encoder):
            convert = None  # without words of several vectors it only tokenizes, and complains of long texts

        def prepare(text: str) -> str:
            return convert(text, tokenizer) if convert else text

        length = length or int(tokenizer.model_max_length)
        window = length if chunked and tokenizer.is_fast else None
        return [TextStream(tokenizer, name, offset, length, prepare, attribute, window)]

    def _set(self, scheduler: Any, steps: int, device: torch.device, given: dict[str, Any], **kwargs: Any) -> None:
        """``set_timesteps`` of a scheduler, with a schedule of the user's own where one is ``given``."""
        takes = accepted_by(scheduler.set_timesteps)
        if refused := sorted(set(given) - takes):
            other = sorted({"timesteps", "sigmas"} & takes)
            hint = f"give {other[0]}" if other else "use euler" if "alphas_cumprod" in vars(scheduler) else "give steps"
            raise BadInput(f"scheduler {type(scheduler).__name__} takes no {refused[0]} of one's own; {hint}.")
        kwargs.update(given)
        scheduler.set_timesteps(*(() if given else (steps,)), device=device, **kwargs)

    def _spaced(self, scheduler: Any, sigmas: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's ``sigmas`` as an argument, for schedulers that do not space the levels themselves."""
        own = given or scheduler.config.get("use_flow_sigmas") or "sigmas" not in accepted_by(scheduler.set_timesteps)
        return {} if own else {"sigmas": sigmas}

    def _shifted_timesteps(
        self,
        scheduler: Any,
        steps: int,
        device: torch.device,
        tokens: int,
        max_shift: float,
        given: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """``set_timesteps`` with the resolution-dependent shift ``mu`` of flow models: linear in the image tokens."""
        config = scheduler.config
        if config.get("use_dynamic_shifting"):
            if "mu" not in accepted_by(scheduler.set_timesteps):
                raise NotSupported(
                    f"scheduler {type(scheduler).__name__} cannot shift its timesteps with the picture size, which"
                    f" this model asks for; use flow_euler, dpm++ or unipc."
                )
            short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
            slope = (high - low) / (long - short)
            kwargs["mu"] = tokens * slope + (low - slope * short)  # the pipelines' order of operations, for equal bits
        self._set(scheduler, steps, device, given, **kwargs)
