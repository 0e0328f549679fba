"""The same work on several workers or machines, with Ray Data (extra ``scale``): in order, a few items at a time.

The driver feeds items into a streaming dataset as answers come out of it, in the order of the items, so that what it
does with them - merging tallies, writing files, keeping a journal - is the same on one worker and on a hundred. No more
than :data:`AHEAD` items per worker are under way: memory does not grow with their number.

A cluster that runs already is used (``RAY_ADDRESS``, or one that this process has joined); otherwise a local one is
started and stopped again. Its machines must see the same files.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import itertools
import logging
import os
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sfumato import errors, valid
from sfumato.errors import BadInput, NotSupported, SfumatoError

AHEAD = 2
Tag = TypeVar("Tag")


def check(workers: int | None) -> None:
    """Whether work can be spread. Raises NotSupported without Ray Data, BadInput for fewer than one worker."""
    if workers is not None and workers < 1:
        raise BadInput(f"workers must be at least 1, got {workers}.")
    if any(importlib.util.find_spec(name) is None for name in ("ray", "pyarrow", "pandas")):
        raise NotSupported("spreading work needs Ray Data, which is not installed: pip install 'sfumato[scale]'.")


class Workers:
    """A streaming dataset whose actors each call ``make()`` once and its result for every item they are given.

    Args:
        make: builds what does the work, on the worker (models are loaded there). It and the items travel pickled.
        workers: how many; None: as many as the cluster has CPUs.

    Raises:
        NotSupported: ray is not installed. BadInput: no worker. Whatever SfumatoError the work raised, or that the
            workers were lost. RuntimeError: any other error of the work, which says what it was.
    """

    def __init__(self, make: Callable[[], Callable[[Any], Any]], workers: int | None = None):
        check(workers)
        self._make, self._wanted = make, workers
        self._started = False
        self._sent = self._received = 0

    def __enter__(self) -> Workers:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_settings())
            self._start()
            self._undo = stack.pop_all()
        return self

    def _start(self) -> None:
        import ray

        if not ray.is_initialized():
            _connect(self._wanted)
            self._started = True
        self.count = self._wanted or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._feed: Any = ray.remote(num_cpus=0)(_Feed).remote()
        answers = _dataset(self._feed, self._make, self.count).iter_batches(batch_size=None, prefetch_batches=0)
        self._answers = iter(answers)

    def __exit__(self, *_: object) -> None:
        import ray

        with self._undo:
            del self._answers  # with it the actors go
            ray.kill(self._feed)
            if self._started:
                ray.shutdown()
                self._started = False

    def ask(self, item: Any) -> Any:
        """The answer of a worker to one item."""
        return self._receive(self._send(item))

    def map(self, items: Iterable[tuple[Tag, Any]]) -> Iterator[tuple[Tag, Any]]:
        """(tag, result) for every (tag, item), in their order; an item that is None is handed through unworked.

        Raises whatever the work raised, where the result would have stood.
        """
        under_way: deque[tuple[Tag, int | None]] = deque()

        def answer() -> tuple[Tag, Any]:
            tag, n = under_way.popleft()
            return tag, None if n is None else self._receive(n)

        for tag, item in items:
            under_way.append((tag, None if item is None else self._send(item)))
            while len(under_way) > AHEAD * self.count:
                yield answer()
        while under_way:
            yield answer()

    def _send(self, item: Any) -> int:
        import ray

        n, self._sent = self._sent, self._sent + 1
        ray.get(self._feed.put.remote(n, ray.cloudpickle.dumps(item), done=self._received))
        return n

    def _receive(self, n: int) -> Any:
        """The answer to item n. Those before it that are no longer waited for are skipped."""
        import ray

        while True:
            try:
                (packed,) = next(self._answers)["answer"]
            except ray.exceptions.RayError as error:
                raise SfumatoError(f"the workers stopped: {valid.first_line(error)}") from error
            self._received += 1
            if self._received > n:
                return _opened(ray.cloudpickle.loads(packed))


class _Feed:
    """An actor between the driver, which knows the items, and the dataset, which reads them.

    Numbers make reading repeatable: a reader that Ray has started anew is given what it had read before, or, where the
    answer is out already, nothing.
    """

    def __init__(self) -> None:
        self._items: dict[int, bytes] = {}
        self._done = 0
        self._changed = asyncio.Condition()

    async def put(self, n: int, item: bytes, done: int) -> None:
        async with self._changed:
            self._items[n] = item
            for old in range(self._done, done):
                del self._items[old]
            self._done = done
            self._changed.notify_all()

    async def get(self, n: int) -> bytes:
        async with self._changed:
            await self._changed.wait_for(lambda: n < self._done or n in self._items)
            return self._items.get(n, b"")


def _dataset(feed: Any, make: Callable[[], Callable[[Any], Any]], count: int) -> Any:
    """What is fed -> {"answer": pickled}, a row a block, computed by ``count`` actors, in order."""
    import pyarrow
    from ray import data, get
    from ray.data.block import BlockMetadata

    class Items(data.Datasource):
        def get_name(self) -> str:
            return "Items"

        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[data.ReadTask]:
            def read() -> Iterator[Any]:
                for n in itertools.count():
                    yield pyarrow.table({"item": [get(feed.get.remote(n))]})

            unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [data.ReadTask(read, unknown)]

    # reading takes no CPU of its own, or the workers would have one too few
    items = data.read_datasource(Items(), num_cpus=0, override_num_blocks=1)
    answers = items.map(_Worker, fn_constructor_args=(make,), compute=data.ActorPoolStrategy(size=count), num_cpus=1)
    answers.context.execution_options.preserve_order = True
    answers.context.target_max_block_size = 1  # an item must not wait for a block to fill
    answers.context.execution_no_progress_timeout_s = -1  # how long one may take is not ours to say
    answers.context.enable_progress_bars = answers.context.print_on_execution_start = False
    return answers


class _Worker:
    """What goes wrong on purpose travels as its name and message: not every exception can be pickled."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]):
        self._make = make
        self._work: Callable[[Any], Any] | None = None

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        from ray import cloudpickle

        return {"answer": cloudpickle.dumps(self._answer(cloudpickle.loads(row["item"])))}

    def _answer(self, item: Any) -> Any:
        try:
            if self._work is None:
                self._work = self._make()
            return self._work(item)
        except SfumatoError as error:
            return _Failed(str(error), type(error).__name__)
        except Exception as error:
            return _Failed(f"{type(error).__name__}: {error}", trace=traceback.format_exc())


class _Failed(NamedTuple):
    """What went wrong on a worker: an error of ours by its name, or one that nobody expects and where it arose."""

    message: str
    kind: str = ""
    trace: str = ""


def _opened(answer: Any) -> Any:
    if not isinstance(answer, _Failed):
        return answer
    if not answer.kind:
        raise RuntimeError(answer.message) from RuntimeError(f"on a worker:\n{answer.trace}")
    made = getattr(errors, answer.kind, SfumatoError)
    error = made.__new__(made)  # the message is whole: the constructor would write another
    error.args = (answer.message,)
    raise error


def _connect(workers: int | None) -> None:
    """Joins the cluster of ``RAY_ADDRESS``, or starts one on this machine."""
    import ray

    address = os.environ.get("RAY_ADDRESS")
    which: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
    with _mute():
        ray.init(**which, log_to_driver=False, logging_level=logging.ERROR)


@contextlib.contextmanager
def _mute() -> Iterator[None]:
    """Within: nothing reaches the terminal. Ray's core says there that it is asked to be quiet."""
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Within: Ray reports nothing to its makers, says nothing on the console (its log files have it all) and leaves
    graphics cards as it finds them, and the workers of a cluster that is started here find this very package."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    importlib.import_module("ray.data")  # its console is there from now on
    consoles = [each for each in logging.getLogger("ray.data").handlers if each.name == "console"]
    levels = [each.level for each in consoles]
    try:
        for each in consoles:
            each.setLevel(logging.CRITICAL)
        yield
    finally:
        for each, level in zip(consoles, levels, strict=True):
            each.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
