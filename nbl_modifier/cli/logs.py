# SPDX-License-Identifier: Apache-2.0
"""Which log lines a person at a terminal sees."""

import os
import sys
from typing import Any


def show_ours_and_warnings() -> None:
    """
    Log nbl_modifier's lines and everybody's warnings, each warning once, to stderr.

    llm-compressor logs some three lines per quantized module. Its own environment
    variable LLM_COMPRESSOR_LOG_LEVEL, where set, is left in charge.
    """
    import llmcompressor  # noqa: F401  configures the logger when it is imported
    from loguru import logger

    if os.environ.get("LLM_COMPRESSOR_LOG_LEVEL"):
        return
    logger.remove()
    logger.add(sys.stderr, format="{time:HH:mm:ss} {message}", filter=_Filter())


class _Filter:
    """Decides about one log record; remembers the warnings it has let through."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, record: Any) -> bool:
        message, level = record["message"], record["level"].name
        if level in ("WARNING", "ERROR", "CRITICAL"):
            repeated = message in self._seen
            self._seen.add(message)
            return not repeated
        # The command ends with the ranking; in its log it would be there twice.
        return record["name"].startswith("nbl_modifier") and not message.startswith(
            "NBL ranking"
        )
