"""The same work on several workers or machines, with Ray (extra ``scale``): in order, a few items at a time.

The driver hands out items and takes results in the order of the items, so that what it does with them - merging
tallies, writing files, keeping a journal - is the same on one worker and on a hundred. No more than :data:`AHEAD`
items per worker are under way: memory does not grow with their number.

A cluster that runs already is used (``RAY_ADDRESS``, or one that this process has joined); otherwise a local one is
started and stopped again. Its machines must see the same files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sfumato import errors
from sfumato.errors import BadInput, NotSupported, SfumatoError

AHEAD = 2
Tag = TypeVar("Tag")


def check(workers: int | None) -> None:
    """Whether work can be spread. Raises NotSupported without ray, BadInput for fewer than one worker."""
    if workers is not None and workers < 1:
        raise BadInput(f"workers must be at least 1, got {workers}.")
    if importlib.util.find_spec("ray") is None:
        raise NotSupported("spreading work needs Ray, which is not installed: pip install 'sfumato[scale]'.")


class Workers:
    """Ray actors that each call ``make()`` once and its result for every item they are given.

    Args:
        make: builds what does the work, on the worker (models are loaded there). It and the items travel pickled.
        workers: how many; None: as many as the cluster has CPUs.

    Raises:
        NotSupported: ray is not installed. BadInput: no worker.
    """

    def __init__(self, make: Callable[[], Callable[[Any], Any]], workers: int | None = None):
        check(workers)
        self._make, self._wanted = make, workers
        self._actors: list[Any] = []
        self._started = False

    def __enter__(self) -> Workers:
        import ray

        if not ray.is_initialized():
            with _quietly():
                address = os.environ.get("RAY_ADDRESS")
                if address:
                    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
                else:
                    _start_local(self._wanted)
            self._started = True
        count = self._wanted or max(1, int(ray.cluster_resources().get("CPU", 1)))
        actor = ray.remote(num_cpus=1)(_Actor)
        self._actors = [actor.remote(self._make) for _ in range(count)]
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._started:
            ray.shutdown()
            self._started = False

    def ask(self, item: Any) -> Any:
        """The answer of the first worker to one item."""
        import ray

        return _opened(ray.get(self._actors[0].work.remote(item)))

    def map(self, items: Iterable[tuple[Tag, Any]]) -> Iterator[tuple[Tag, Any]]:
        """(tag, result) for every (tag, item), in their order; an item that is None is handed through unworked.

        Raises whatever the work raised, where the result would have stood.
        """
        import ray

        under_way: deque[tuple[Tag, Any]] = deque()
        sent = 0

        def answer() -> tuple[Tag, Any]:
            tag, promise = under_way.popleft()
            return tag, None if promise is None else _opened(ray.get(promise))

        for tag, item in items:
            promise = None
            if item is not None:
                promise = self._actors[sent % len(self._actors)].work.remote(item)
                sent += 1
            under_way.append((tag, promise))
            while len(under_way) > AHEAD * len(self._actors):
                yield answer()
        while under_way:
            yield answer()


class _Actor:
    """One worker. What goes wrong on purpose travels as its name and message: not every exception can be pickled."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]):
        self._make = make
        self._work: Callable[[Any], Any] | None = None

    def work(self, item: Any) -> tuple[str, Any]:
        try:
            if self._work is None:
                self._work = self._make()
            return "", self._work(item)
        except SfumatoError as error:
            return type(error).__name__, str(error)


def _opened(answer: tuple[str, Any]) -> Any:
    kind, value = answer
    if not kind:
        return value
    made = getattr(errors, kind, SfumatoError)
    error = made.__new__(made)  # the message is whole: the constructor would write another
    error.args = (value,)
    raise error


def _start_local(workers: int | None) -> None:
    """A cluster on this machine, whose workers find this very package."""
    import ray

    here = str(Path(__file__).parents[1])
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    ray.init(
        num_cpus=workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Within: Ray reports nothing to its makers, and does not override what it finds of graphics cards."""
    told = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
