# SPDX-License-Identifier: Apache-2.0
"""The command as a whole: help, exit codes, tracebacks, what it imports."""

import subprocess
import sys
from argparse import Namespace

import pytest

from nbl_modifier import cli


def test_help_shows_commands_and_an_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for words in ("compress", "generate", "example:", "--recipe"):
        assert words in text


@pytest.mark.parametrize("command", ["compress", "generate"])
def test_each_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"nbl {command} meta-llama" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from nbl_modifier.cli import build_parser\n"
        "build_parser().format_help()\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "nbl_modifier.cli"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "usage: nbl" in result.stderr


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make ``nbl generate`` raise ``error``; return arguments that run it."""

    def run(args: Namespace) -> None:
        raise error

    monkeypatch.setattr("nbl_modifier.cli.generate.run", run)
    return ["generate", "model", "--prompt", "x"]


@pytest.mark.parametrize(
    "error",
    [ValueError("why"), NotImplementedError("why"), OSError("why"), ImportError("why")],
)
def test_expected_errors_are_one_line_and_exit_code_2(
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(fail_with(error, monkeypatch)) == 2
    captured = capsys.readouterr()
    assert captured.err == "nbl: error: why\n"
    assert captured.out == ""


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = fail_with(ValueError("why"), monkeypatch)
    with pytest.raises(ValueError, match="why"):
        cli.main([*arguments, "--debug"])


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = fail_with(AttributeError("bug"), monkeypatch)
    with pytest.raises(AttributeError, match="bug"):
        cli.main(arguments)


def test_interrupt_has_the_exit_code_shells_expect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cli.main(fail_with(KeyboardInterrupt(), monkeypatch)) == 130
