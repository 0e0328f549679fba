"""Diffusion and flow: from noise along the levels of a diffusers scheduler, which makes every step."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import BadInput, NotSupported, SfumatoError
from sfumato.models import Model, quiet
from sfumato.sampling.noise import Path
from sfumato.sampling.options import Options
from sfumato.sampling.process.base import Process, fewest, taken


class Diffusion(Process):
    """States are latents (b c h w), (b c f h w), ... in the scheduler's scaling; predictions are epsilon, v, x0 or
    velocity. The only process with a noise path."""

    name = "diffusion"
    title = "diffusion"
    takes = frozenset(
        {"steps", "timesteps", "sigmas", "scheduler", "eta", "start", "strength", "denoising_start", "denoising_end"}
    )
    noise_path = differentiable = takes_image = True

    def prepare(self, backward: bool) -> None:
        self._scheduler = self.make_scheduler()
        self.timesteps = self._scheduler.timesteps
        self._path = Path(self._scheduler)
        self._refuse_unfit()
        self.begin = len(self.timesteps) - 1 if backward else self._begin()
        if not backward:
            self.until = self._until()
            self._refuse_zero_snr()
        accepted = inspect.signature(self._scheduler.step).parameters
        eta = self.options.eta
        if eta and "eta" not in accepted:
            name = type(self._scheduler).__name__
            way = "flow models take none: leave it out" if self.model.flow else "use scheduler 'ddim'"
            raise BadInput(f"eta is {eta:g}, but {name} adds no noise by eta; {way}.")
        wanted = {"eta": eta, "generator": self.generators}
        self.step_options = {name: value for name, value in wanted.items() if name in accepted}
        if self.begin and hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(self.begin)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def scheduler(self) -> Any:
        return self._scheduler

    @classmethod
    def steps(cls, model: Model, options: Options) -> int:
        given = _own_schedule(options)
        if not given:
            return super().steps(model, options)
        scheduler = model.make_scheduler(options.scheduler or model.defaults["scheduler"])
        _set(model, scheduler, options, 1, options.size)
        steps = int(scheduler.num_inference_steps)
        if options.steps not in (None, steps):
            raise BadInput(f"steps is {options.steps}, but the {next(iter(given))} given make {steps}; leave it out.")
        return steps

    def make_scheduler(self) -> Any:
        """A fresh scheduler with the whole schedule set. Raises BadInput for a number of steps that it refuses."""
        scheduler = self.model.make_scheduler(self.options.scheduler)
        steps = self.steps(self.model, self.options)
        trained = scheduler.config.get("num_train_timesteps", 1000)
        if steps > trained:
            raise BadInput(f"steps is {steps}; this scheduler has {trained} timesteps at most.")
        _set(self.model, scheduler, self.options, steps, self.size)
        if hasattr(scheduler, "noise_sampler_seed"):  # Brownian motion: one path per sample, from its own seed
            scheduler.noise_sampler_seed = [generator.initial_seed() for generator in self.generators]
        return scheduler

    def _refuse_unfit(self) -> None:
        if (self._path.kind == "flow") != self.model.flow:
            raise self._unfit(f"it predicts {self._path.kind}")
        needed = [
            name
            for name, parameter in inspect.signature(self._scheduler.step).parameters.items()
            if parameter.default is parameter.empty and name not in ("model_output", "timestep", "sample")
        ]
        if needed:
            other = self.model.deterministic_scheduler
            raise self._unfit(f"its step needs {', '.join(needed)} as well; give scheduler {other!r}")

    def _refuse_zero_snr(self) -> None:
        """Where a schedule begins without any signal, predicted noise implies no picture: it would be divided by 0."""
        first = self.timesteps[self.begin : self.begin + 1]
        if self._path.kind == "epsilon" and len(first) and self._path.alpha_sigma(first[0])[0] == 0:
            raise self._unfit(
                "it begins at a signal-to-noise ratio of zero, where predicted noise implies no picture; set "
                "rescale_betas_zero_snr=False in its configuration, or use euler or dpm++, which begin a little later"
            )

    def _unfit(self, why: str) -> NotSupported:
        return _unfit(self.model, self.options, why)

    def scheduler_at(self, i: int) -> Any:
        """A fresh scheduler that takes its next step at index ``i``."""
        scheduler = self.make_scheduler()
        if i and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(i)
        return scheduler

    def _begin(self) -> int:
        """Index of the schedule at which the walk begins."""
        source, steps = self.source, self.steps(self.model, self.options)
        start = source.start
        if source.strength is not None:
            share = steps * source.strength
            # diffusers rounds the steps it takes down for diffusion models and those it skips down for flow models
            start = int(steps - share) if self.model.flow else steps - int(share)
            if start == steps and share:
                raise BadInput(
                    f"strength {source.strength:g} leaves no step out of {steps}; give at least {fewest(steps)}."
                )
        elif source.after is not None:
            return self._after(source.after)
        return min(start * self._scheduler.order, len(self.timesteps))

    def _until(self) -> int | None:
        """Where another model goes on. Raises BadInput where nothing is left to do here."""
        end = self.options.denoising_end
        if end is None:
            return None
        until = int((self.timesteps >= self._cutoff(end)).sum())
        if until <= self.begin:
            raise BadInput(f"denoising_end is {end:g}, but the walk begins later; give more.")
        return until

    def _after(self, share: float) -> int:
        """The step that follows on this share of the noise levels, as in diffusers. Raises BadInput where none does."""
        left = int((self.timesteps < self._cutoff(share)).sum())
        if not left:
            raise BadInput(f"denoising_start is {share:g}, which leaves no step of the schedule; give less.")
        second = self._scheduler.order == 2 and left % 2 == 0  # never between the two halves of a step
        return len(self.timesteps) - left - second

    def _cutoff(self, share: float) -> int:
        trained = int(self._scheduler.config.num_train_timesteps)
        return int(round(trained - share * trained))

    def initial(self, rows: slice) -> Tensor:
        model, source, b = self.model, self.source, len(self.generators)
        if source.latents is not None:
            latents = taken(source.latents, rows, b).to(device=model.device, dtype=model.state_dtype)
            return latents if self.begin or source.after else model.prepare(latents, self._scheduler)
        if source.pixels is None:
            return model.prepare(self.noise(), self._scheduler)
        clean = model.encode_image(taken(source.pixels, rows, b), self.generators)
        eps = self.noise()
        if self.begin >= len(self.timesteps):  # strength 0
            return clean
        t = self.timesteps[self.begin : self.begin + 1].repeat(b)
        if hasattr(self._scheduler, "scale_noise"):
            return self._scheduler.scale_noise(clean, t, eps)
        return self._scheduler.add_noise(clean, eps, t)

    def shown(self, x: Tensor, t: Tensor) -> Tensor:
        scale = getattr(self._scheduler, "scale_model_input", None)
        return x if scale is None else scale(x, t)

    def advance(self, output: Tensor, i: int, x: Tensor, options: dict[str, Any]) -> Tensor:
        settings = {**self.step_options, **options}
        before = _global_state(x)
        brownian = hasattr(self._scheduler, "noise_sampler_seed")  # its library warns of rounding at the ends
        with quiet() if brownian else nullcontext():
            x = self._scheduler.step(output, self.timesteps[i], x, **settings, return_dict=False)[0]
        if self.model.family.casts_state:
            x = x.to(self.model.state_dtype)
        if not torch.equal(before, _global_state(x)):
            raise NotSupported(
                f"scheduler {type(self._scheduler).__name__} draws from torch's global random state, so a sample would "
                f"depend on its neighbours and no recipe could repeat it; use another one."
            )
        return x

    def seek(self, i: int) -> None:
        self._scheduler = self.scheduler_at(i)

    def fork(self) -> Process:
        other = super().fork()
        other.seek(self.begin)
        return other


def _own_schedule(options: Options) -> dict[str, Any]:
    """The timesteps or sigmas that the user gave. Raises BadInput for both."""
    given = {name: getattr(options, name) for name in ("timesteps", "sigmas") if getattr(options, name) is not None}
    if len(given) > 1:
        raise BadInput("timesteps and sigmas are both given; one of them says the schedule.")
    return given


def _set(model: Model, scheduler: Any, options: Options, steps: int, size: tuple[int, int] | None) -> None:
    """Set the whole schedule for a picture of (width, height), by default the model's own."""
    given = _own_schedule(options)
    what = next((f"{name} is {values}" for name, values in given.items()), f"steps is {steps}")
    try:
        height, width = (None, None) if size is None else size[::-1]
        model.timesteps(scheduler, steps, height, width, options.frames, **given)
    except SfumatoError:
        raise
    except ValueError as error:  # a limit of this scheduler's own
        raise BadInput(f"{what}, which {type(scheduler).__name__} refuses: {' '.join(str(error).split())}") from error
    except (AttributeError, LookupError, TypeError) as error:  # one that is set up in another way
        raise _unfit(model, options, f"its schedule cannot be set ({type(error).__name__}: {error})") from error


def _unfit(model: Model, options: Options, why: str) -> NotSupported:
    given = model.pipe.scheduler if options.scheduler is None else options.scheduler
    name = given if isinstance(given, str) else type(given).__name__
    return NotSupported(f"scheduler {name} does not serve {model.name}: {' '.join(why.split())}.")


def _global_state(x: Tensor) -> Tensor:
    """torch's global random state on the device of ``x``."""
    return torch.cuda.get_rng_state(x.device) if x.device.type == "cuda" else torch.get_rng_state()
