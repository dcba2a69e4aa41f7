# SPDX-License-Identifier: Apache-2.0
"""Our lines and everybody's warnings, each warning once."""

from collections.abc import Iterator
from typing import Any

import pytest
from llmcompressor.logger import LoggerConfig, configure_logger
from loguru import logger

from nbl_modifier.cli.logs import show_ours_and_warnings


@pytest.fixture(autouse=True)
def restore_logger() -> Iterator[None]:
    """Give other tests llm-compressor's own configuration back."""
    yield
    configure_logger(LoggerConfig())


def log_as(module: str, level: str, message: str) -> None:
    """Log one line as if from ``module``."""

    def rename(record: Any) -> None:
        record["name"] = module

    logger.patch(rename).log(level, message)


def test_what_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLM_COMPRESSOR_LOG_LEVEL", raising=False)
    show_ours_and_warnings()
    log_as("nbl_modifier.calibration.calibration", "INFO", "our layer")
    log_as(
        "nbl_modifier.llmcompressor_plugin.modifier",
        "INFO",
        "NBL ranking\nprinted at the end",
    )
    log_as("llmcompressor.modifiers.gptq", "INFO", "their module")
    log_as("llmcompressor.modifiers.gptq", "METRIC", "their error")
    for _ in range(3):
        log_as("llmcompressor.utils", "WARNING", "their warning")
    captured = capsys.readouterr()
    lines = [line.partition(" ")[2] for line in captured.err.splitlines()]
    assert lines == ["our layer", "their warning"]
    assert captured.out == ""


def test_llm_compressors_own_setting_wins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_COMPRESSOR_LOG_LEVEL", "INFO")
    configure_logger(LoggerConfig())
    show_ours_and_warnings()
    log_as("llmcompressor.modifiers.gptq", "INFO", "their module")
    assert "their module" in capsys.readouterr().out
