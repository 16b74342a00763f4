"""Loading transformers and peft with a visible phase, and silencing the libraries' warnings and progress bars."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.screen import Screen

LOUD = ("bitsandbytes", "datasets", "huggingface_hub", "accelerate")
WARNING_MODULES = r"(torch\.(utils|jit|autograd|nn)|transformers|peft|bitsandbytes|accelerate|datasets)\."


@contextlib.contextmanager
def quiet_libraries(screen: Screen | None = None) -> Iterator[None]:
    """Load transformers (with a screen: peft too) and silence the libraries' warnings and progress bars within the block.

    Logging and warnings are restored afterwards, and no bar leaves a thread.
    """
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if screen is not None:
        with screen.phase("libraries"):  # takes seconds, so it is a phase of its own
            import peft  # noqa: F401
    import transformers
    from tqdm import tqdm
    from transformers.utils.logging import is_progress_bar_enabled

    loggers = {name: logging.getLogger(name) for name in (*LOUD, "datasets.utils.file_utils")}
    levels = {name: logger.level for name, logger in loggers.items()}
    verbosity, bars = transformers.logging.get_verbosity(), is_progress_bar_enabled()
    monitor, tqdm.monitor_interval = tqdm.monitor_interval, 0  # else even a bar that is off begins a thread, which stays
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    loggers["datasets.utils.file_utils"].setLevel(logging.WARNING)  # it reports network failures and retries
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=WARNING_MODULES)
        try:
            yield
        finally:
            tqdm.monitor_interval = monitor
            transformers.logging.set_verbosity(verbosity)
            if bars:
                transformers.logging.enable_progress_bar()
            for name, level in levels.items():
                loggers[name].setLevel(level)
