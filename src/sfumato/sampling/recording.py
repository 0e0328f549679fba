"""Recordings: a generation written down while it runs, so that later ones can lean on it without running it again.

A :class:`Recorder` watches any run and changes nothing; its :class:`Recording` then holds the latents before and after
every step and, where asked for, what attention compared there: the conditional rows' queries and keys, from which the
map of a site and step is computed again exactly (:meth:`Recording.call`). That is less than the maps themselves
wherever there are more keys than features, and the keys of a cross-attention, which the text alone makes, are kept
once for all steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sfumato import files
from sfumato.attention.call import Call
from sfumato.attention.tap import Tap
from sfumato.errors import BadInput, NoMatch
from sfumato.markup import described
from sfumato.models import Site
from sfumato.sampling.intervention import Coverage, Intervention
from sfumato.sampling.loop import walk
from sfumato.sampling.run import Run, Step
from sfumato.text.weights import encode_weighted, read_weights

__all__ = ["Recorder", "Recording", "RecordingTooLarge", "record_auxiliary"]

FORMAT = "sfumato-recording-1"
LIMIT = 8.0  # GiB; the queries of Stable Diffusion 1, 50 steps at 512 pixels in float32, come to about 2


class RecordingTooLarge(BadInput):
    """A recording would outgrow its limit."""


@dataclass(eq=False)
class Recording:
    """What a :class:`Recorder` wrote down of ``b`` samples.

    ``latents`` (s+1 b ...), such as (s+1 b c h w), in the scheduler's scaling: ``latents[0]`` is what the walk began
    with, ``latents[-1]`` its end. ``timesteps`` (total): the whole schedule, of which the walk began at index
    ``begin``. ``prompts``, ``size`` (width, height), ``model``: of that run. ``facts``: plain JSON values that the
    maker adds. ``tensors``: by ``"step|site path|what"``; equal ones are one object.
    """

    latents: Tensor
    timesteps: Tensor
    begin: int
    prompts: list[str]
    size: tuple[int, int]
    model: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    __repr__ = described

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, i: int) -> Tensor:
        """The latents (b ...) that step ``i`` of the schedule starts from; one behind the last: the clean ones."""
        if not 0 <= i - self.begin < len(self.latents):
            raise NoMatch(f"step {i} is not recorded; there are {self.begin} to {self.begin + len(self.latents) - 1}.")
        return self.latents[i - self.begin]

    def holds(self, i: int, site: Site) -> bool:
        """Whether attention at ``site`` was recorded in step ``i``."""
        return f"{i}|{site.path}|q" in self.tensors

    def call(self, i: int, site: Site, values: Tensor | None = None) -> Call:
        """Attention at ``site`` in step ``i`` as it was (b rows, conditional branch), paid to other ``values``
        (b k t d) if given. Raises NoMatch where it was not recorded."""
        if not self.holds(i, site):
            steps = sorted({int(name.split("|")[0]) for name in self.tensors if f"|{site.path}|" in name})
            held = f"steps {steps[0]} to {steps[-1]} of it are" if steps else "nothing of it is"
            raise NoMatch(f"attention {site.path} at step {i} is not recorded; {held}. Record it over a wider window.")
        q, k = (self.tensors[f"{i}|{site.path}|{what}"] for what in "qk")
        like = {} if values is None else {"device": values.device}
        mask = self.tensors[f"{i}|{site.path}|mask"].to(**like) if f"{i}|{site.path}|mask" in self.tensors else None
        q, k = q.to(**like), k.to(**like)
        scale = self.facts.get("scales", {}).get(site.path)
        return Call(q, k, k if values is None else values, mask, scale=scale, site=site, module=nn.Identity())

    @property
    def nbytes(self) -> int:
        """Memory that the tensors take, or would take if they were not on disk."""
        own = {id(tensor): tensor for tensor in [*dict(self.tensors).values(), self.latents]}
        return sum(tensor.numel() * tensor.element_size() for tensor in own.values())

    def save(self, path: Path | str) -> Path:
        """Write everything to one safetensors file, whole or not at all."""
        held = dict(self.tensors)
        first: dict[int, str] = {}
        same = {}
        for name, tensor in held.items():
            if first.setdefault(id(tensor), name) != name:
                same[name] = first[id(tensor)]
        tensors = {name: tensor for name, tensor in held.items() if name not in same}
        facts = {
            "begin": self.begin, "prompts": self.prompts, "size": self.size, "model": self.model, "facts": self.facts,
            "same": same,
        }  # fmt: skip
        own = {"latents": self.latents, "timesteps": self.timesteps}
        metadata = {"format": FORMAT, "recording": json.dumps(facts, ensure_ascii=False)}
        return files.save_tensors(path, {**own, **tensors}, metadata)

    @classmethod
    def load(cls, path: Path | str) -> Recording:
        """What :meth:`save` wrote. Attention stays in the file, mapped, until a step asks for it. Raises BadInput for
        any other file, OSError when it cannot be read."""
        with files.reading_tensors(path, FORMAT, "recording") as (file, metadata):
            stored = json.loads(metadata["recording"])
            names = [name for name in file.keys() if name not in ("latents", "timesteps")]
            tensors = _OnDisk(Path(path), {**{name: name for name in names}, **stored["same"]})
            size, facts = tuple(map(int, stored["size"])), dict(stored["facts"])
            latents, timesteps = file.get_tensor("latents"), file.get_tensor("timesteps")
            prompts = [str(prompt) for prompt in stored["prompts"]]
            if latents.dim() < 3 or latents.shape[1] != len(prompts) or len(size) != 2:
                raise ValueError("shapes")
            return cls(latents, timesteps, int(stored["begin"]), prompts, size, str(stored["model"]), tensors, facts)


class _OnDisk(Mapping[str, Tensor]):
    """Tensors of a file, each read when it is asked for."""

    def __init__(self, path: Path, names: dict[str, str]):
        self.path, self.names = path, names

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(str(self.path), framework="pt") as file:
            return file.get_tensor(self.names[name])

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Recorder(Intervention):
    """Writes a run down; afterwards ``recording`` holds it. Changes not one bit of the run.

    ``wants(site, progress)`` says whose attention is kept and when; nothing by default. ``limit``: GiB above which the
    run is refused before it starts. A run has to be one batch.
    """

    role = "observer"
    couples_samples = True  # one recording holds one batch

    def __init__(self, wants: Callable[[Site, float], bool] | None = None, limit: float = LIMIT):
        self.wants, self.limit = wants, limit
        self.recording: Recording | None = None

    def start(self, run: Run) -> None:
        """Raises NotSupported where states change their shape on the way."""
        if not run.process.keeps_shape:
            raise run.process.lacks("state that keeps its shape", self.name)
        self._tensors: dict[str, Tensor] = {}
        self._scales: dict[str, float] = {}
        self._latest: dict[str, Tensor] = {}
        self._latents: list[Tensor] = []
        self._wanted: dict[str, set[int]] = {}
        wants = self.wants
        if wants is not None:
            for site in run.sites:
                steps = {i for i in range(run.begin, run.total) if wants(site, i / run.total)}
                if steps:
                    self._wanted[site.path] = steps

    def taps(self) -> list[Tap]:
        if not self._wanted:
            return []
        return [Tap(lambda site: site.path in self._wanted, observe=self._look, name="recorder")]

    def on_noise(self, run: Run, x: Tensor) -> Tensor:
        self._latents.append(x.detach().clone())
        return x

    def after_step(self, step: Step) -> None:
        self._latents.append(step.x.detach().clone())
        self.mark(step)

    def finish(self, run: Run) -> None:
        self.recording = Recording(
            latents=torch.stack(self._latents),
            timesteps=run.timesteps,
            begin=run.begin,
            prompts=list(run.prompts),
            size=run.size,
            model=run.model.name,
            tensors=self._tensors,
            facts={"scales": self._scales, "text": run.model.text_length},
        )
        del self._tensors, self._latents, self._latest

    def _look(self, call: Call) -> None:
        i, path = call.step.i, call.site.path
        if i not in self._wanted[path] or "cond" not in call.rows:
            return
        part = call.branch("cond")
        if call.given_scale is not None:
            self._scales[path] = call.given_scale
        parts = {"q": part.q, "k": part.k} | ({} if part.mask is None else {"mask": part.mask})
        for what, tensor in parts.items():
            name, value = f"{path}|{what}", tensor.detach()
            latest = self._latest.get(name)
            if what == "q" or latest is None or latest.shape != value.shape or not torch.equal(latest, value):
                latest = value.clone(memory_format=torch.contiguous_format)
            self._latest[name] = self._tensors[f"{i}|{name}"] = latest
        self._refuse_too_much(i)

    def _refuse_too_much(self, i: int) -> None:
        """After the first step it is known what all of them will take."""
        if i != min(min(steps) for steps in self._wanted.values()):
            return
        calls = sum(len(steps) for steps in self._wanted.values())
        held = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())
        recorded = sum(name.endswith("|q") for name in self._tensors)
        expected = held * calls / recorded / 2**30
        if recorded == sum(i in steps for steps in self._wanted.values()) and expected > self.limit:
            raise RecordingTooLarge(
                f"recording this run would take about {expected:.1f} GiB, more than the limit of {self.limit:g}; "
                f"record fewer sites or a shorter window, make a smaller picture, or raise the limit."
            )


def record_auxiliary(run: Run, x: Tensor, prompts: Sequence[str], recorder: Recorder) -> Recording:
    """What ``run``, about to walk from latents ``x`` (b ...), would be with other prompts and without its
    interventions: walked now, with the same noise, and recorded. Weights that adapters have attached stay attached.
    Prompts may hold weights of words."""
    assert run.condition is not None
    negatives = run.negatives or [""] * len(run)
    if run.negatives and run.request is not None and run.request.negatives:  # with their weights
        negatives = run.request.negatives[run.samples.start : run.samples.stop]
    pairs = list(dict.fromkeys(zip(prompts, negatives, strict=True)))
    encoded = encode_weighted(
        run.model,
        [prompt for prompt, _ in pairs],
        None if run.negatives is None else [negative for _, negative in pairs],
        guidance=run.guidance.on or bool(run.compose),
        embedded_guidance=run.condition.guidance,
        weighting=run.weighting,
    )
    recorder.activity = Coverage()
    process = run.process.fork()
    auxiliary = replace(
        run,
        process=process,
        parts=(recorder,),
        prompts=[read_weights(prompt).text for prompt in prompts],
        condition=encoded.rows([pairs.index(pair) for pair in zip(prompts, negatives, strict=True)]),
        generators=process.generators,
        cost=0.0,
        _stack=ExitStack(),
        _taps=[],
        _seams={},
        _words=None,
    )
    with auxiliary:
        recorder.start(auxiliary)
        auxiliary.connect_taps()
        walk(auxiliary, x)
        recorder.finish(auxiliary)
    run.cost += auxiliary.cost
    assert recorder.recording is not None
    return recorder.recording
