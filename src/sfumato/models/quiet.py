"""Keep diffusers and transformers from writing to the console, for the length of a ``with`` block only."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Silence notices, deprecation warnings and (unless ``bars``) progress bars; all settings are restored after.

    Errors still reach the caller as exceptions.
    """
    import diffusers.utils.logging as diffusers_logging
    import huggingface_hub.utils as hub
    import transformers.utils.logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    diffusers_bars = diffusers_logging.is_progress_bar_enabled()
    transformers_bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            if not bars:
                diffusers_logging.disable_progress_bar()
                transformers_logging.disable_progress_bar()  # also switches off those of the hub client
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if diffusers_bars:
                diffusers_logging.enable_progress_bar()
            if transformers_bars:
                transformers_logging.enable_progress_bar()
            (hub.enable_progress_bars if hub_bars else hub.disable_progress_bars)()
