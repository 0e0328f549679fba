"""Keep diffusers and transformers from writing to the console, for the length of a ``with`` block only."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NOWHERE = logging.NullHandler()


@contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Silence notices, deprecation warnings and (unless ``bars``) progress bars; all settings are restored after.

    Errors still reach the caller as exceptions.
    """
    import diffusers.utils.logging as diffusers_logging
    import huggingface_hub.utils as hub
    import transformers.utils.logging as transformers_logging

    # their handlers are taken away: a change of level would empty the caches of all loggers there are
    saved = [
        (logger, logger.handlers, logger.propagate)
        for logger in map(logging.getLogger, ("diffusers", "transformers", "huggingface_hub"))
    ]
    diffusers_bars = diffusers_logging.is_progress_bar_enabled()
    transformers_bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger, _, _ in saved:
                logger.handlers, logger.propagate = [_NOWHERE], False
            if not bars:
                diffusers_logging.disable_progress_bar()
                transformers_logging.disable_progress_bar()  # also switches off those of the hub client
            yield
        finally:
            for logger, handlers, propagate in saved:
                logger.handlers, logger.propagate = handlers, propagate
            if diffusers_bars:
                diffusers_logging.enable_progress_bar()
            if transformers_bars:
                transformers_logging.enable_progress_bar()
            (hub.enable_progress_bars if hub_bars else hub.disable_progress_bars)()
