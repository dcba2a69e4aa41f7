# SPDX-License-Identifier: Apache-2.0
"""
Every option of every command: a wrong value is refused by the parser, which names the
option; a right one arrives. Options without effect are refused. No model is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nbl_modifier.cli import build_parser
from nbl_modifier.cli.benchmark import _refuse_idle
from nbl_modifier.cli.evaluate import run as run_evaluate
from nbl_modifier.cli.sources import refuse_idle_data_options

FUZZ = settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# What each command cannot do without.
NEEDED = {
    "compress": ["compress", "model", "--recipe", "r.yaml", "--output", "out"],
    "rank": ["rank", "model"],
    "evaluate": ["evaluate", "checkpoint"],
    "generate": ["generate", "model", "--prompt", "x"],
    "benchmark": ["benchmark", "checkpoint", "--baseline", "model"],
    "report": ["report", "folder"],
}
HOSTILE = st.one_of(
    st.sampled_from(
        ["", " ", "\0", "0", "-1", "1", "00", "1e3", "nan", "inf", "-inf", "0x10", "1,"]
        + ["true", "yes", "~", "~/x", "{}", "[]", "null", '{"a": 1}', "1,2", "a,b", ","]
        + [str(2**31), str(2**63), "9" * 5000, "x" * 300, "../..", "é", "٣", "1_0"]
    ),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
)


def parse(*arguments: str) -> argparse.Namespace | str:
    """Return the parsed command line, or what the parser says against it."""
    said, parsed = io.StringIO(), None
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        parsed = build_parser().parse_args(arguments)
    return said.getvalue() if parsed is None else parsed


def options() -> list[tuple[str, str]]:
    """Return each option of each command that takes a value."""
    (commands,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return [
        (name, action.option_strings[0])
        for name, command in commands.choices.items()
        for action in command._actions
        if action.option_strings and action.nargs is None
    ]


def is_right(option: str, value: Any) -> bool:
    """Return whether a value that the parser let through is one of its option."""
    kinds: dict[type, Callable[[Any], bool]] = {
        int: lambda number: 0 <= number < 2**63 and (number > 0 or option == "--seed"),
        float: lambda number: math.isfinite(number) and number > 0,
        str: lambda text: bool(text.strip()) and "\0" not in text,
        tuple: lambda numbers: numbers and all(number > 0 for number in numbers),
        list: lambda names: names and all(name.strip() for name in names),
        dict: lambda fields: all(isinstance(name, str) for name in fields),
    }
    if isinstance(value, Path):
        value = str(value)
    return not isinstance(value, bool) and bool(kinds[type(value)](value))


@pytest.mark.parametrize(("command", "option"), options())
def test_fuzz_values(
    command: str, option: str, hostile_input: Callable[[], None]
) -> None:
    @FUZZ
    @given(HOSTILE)
    @example("")
    @example("\0")
    @example("9" * 5000)
    @example("-1")
    def try_one(value: str) -> None:
        hostile_input()
        parsed = parse(*NEEDED[command], f"{option}={value}")
        if isinstance(parsed, str):
            assert f"argument {option}" in parsed.replace("\n", " ")
        else:
            found = getattr(parsed, option[2:].replace("-", "_"))
            assert is_right(option, found), (option, value, found)

    try_one()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seed", "x", "must be an integer from 0 to 9223372036854775807, got 'x'"),
        ("--seed", str(2**64), "must be an integer from 0"),
        (
            "--num-samples",
            "many",
            "must be an integer from 1 to 2147483647, got 'many'",
        ),
        ("--dataset", "", "must not be empty"),
        ("--heldout", " ", "must not be empty"),
        ("--statistics", "", "must not be empty"),
        ("--output", "x" * 300, "is longer than a file name can be"),
    ],
)
def test_hostile_value_is_named(
    option: str, value: str, message: str, hostile_input: Callable[[], None]
) -> None:
    hostile_input()
    said = parse(*NEEDED["compress"], f"{option}={value}")
    assert isinstance(said, str)
    assert f"argument {option}: {message}" in said


@pytest.mark.parametrize(
    ("option", "value"),
    [("--max-seconds", "nan"), ("--max-seconds", "0"), ("--gpu-memory", "1.5")],
)
def test_hostile_number_of_a_benchmark(
    option: str, value: str, hostile_input: Callable[[], None]
) -> None:
    hostile_input()
    said = parse(*NEEDED["benchmark"], option, value)
    assert isinstance(said, str)
    assert f"argument {option}: must be " in said
    assert repr(value) in said


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not in --output=~/x."""
    monkeypatch.setenv("HOME", "/home/me")
    parsed = parse("compress", "~/m", "--recipe=~/r.yaml", "--output=~/out")
    assert not isinstance(parsed, str)
    assert (parsed.model, parsed.recipe) == ("/home/me/m", "/home/me/r.yaml")
    assert parsed.output == "/home/me/out"


def test_given_options_are_known() -> None:
    parsed = parse(*NEEDED["compress"], "--seed", "0", "--overwrite")
    assert not isinstance(parsed, str)
    assert parsed.given == {"model", "recipe", "output", "seed", "overwrite"}
    assert parsed.num_samples == 256  # defaults stay


# --- without effect -------------------------------------------------------------------

# The recipe has nothing that reads any.
NO_DATA = ["--heldout", "none"]


@pytest.mark.parametrize(
    ("command", "given_", "option", "why"),
    [
        ("compress", NO_DATA, ["--dataset", "c4"], "no calibration data are needed"),
        ("compress", NO_DATA, ["--num-samples", "8"], "no calibration data are needed"),
        ("compress", NO_DATA, ["--batch-size", "8"], "no calibration data are needed"),
        ("compress", NO_DATA, ["--text-column", "a"], "no calibration data are needed"),
        ("compress", [], ["--split", "train"], "no dataset of the hub"),
        ("compress", [], ["--dataset-config", "en"], "no dataset of the hub"),
        ("compress", [], ["--concatenate-data"], "always packed"),
        ("compress", [], ["--text-column", "body"], "no columns"),
        ("rank", ["--dataset", "c4"], ["--text-column", "body"], "no columns"),
        ("rank", ["--dataset", "c4"], ["--concatenate-data"], "always packed"),
        ("rank", ["--dataset", "a.txt"], ["--text-column", "x"], "no columns"),
        (
            "compress",
            ["--dataset", "c4"],
            ["--heldout-samples", "8"],
            "without --heldout",
        ),
    ],
)
def test_hostile_option_about_data_without_effect(
    command: str,
    given_: list[str],
    option: list[str],
    why: str,
    hostile_input: Callable[[], None],
) -> None:
    hostile_input()
    calibrates = given_ != NO_DATA
    args = parse(*NEEDED[command], *given_, *option)
    assert not isinstance(args, str)
    with pytest.raises(ValueError, match=why) as caught:
        refuse_idle_data_options(args, calibrates)
    assert str(caught.value).startswith(f"{' '.join(option[:2])}")
    assert "Leave the option out" in str(caught.value)
    args = parse(*NEEDED[command], *given_)
    assert not isinstance(args, str)
    refuse_idle_data_options(args, calibrates)


@pytest.mark.parametrize(
    "options_",
    [
        ["--dataset", "a.jsonl", "--text-column", "body"],
        ["--dataset", "a.csv.gz", "--text-column", "body"],
        ["--heldout", "a.json", "--text-column", "body"],
        ["--dataset", "open_platypus", "--text-column", "body", "--split", "train"],
        ["--dataset", "open_platypus", "--concatenate-data"],
        ["--dataset", "c4", "--dataset-config", "en", "--split", "train"],
        ["--heldout", "stdlib", "--dataset", "c4", "--heldout-samples", "8"],
    ],
)
def test_options_about_data_with_effect(options_: list[str]) -> None:
    args = parse(*NEEDED["compress"], *options_)
    assert not isinstance(args, str)
    refuse_idle_data_options(args, calibrates=True)


@pytest.mark.parametrize(
    ("engine", "accelerated", "option", "why"),
    [
        ("vllm", True, ["--attention", "sdpa"], "in vLLM"),
        ("transformers", True, ["--enforce-eager"], "it is of --engine vllm"),
        ("transformers", True, ["--engine-args", "{}"], "it is of --engine vllm"),
        ("transformers", False, ["--kv-cache-gib", "1"], "it is of --engine vllm"),
        ("vllm", True, ["--kv-cache-gib", "1"], "see --gpu-memory"),
        ("vllm", False, ["--gpu-memory", "0.5"], "see --kv-cache-gib"),
    ],
)
def test_hostile_option_of_another_engine(
    engine: str,
    accelerated: bool,
    option: list[str],
    why: str,
    hostile_input: Callable[[], None],
) -> None:
    hostile_input()
    args = parse(*NEEDED["benchmark"], *option)
    assert not isinstance(args, str)
    with pytest.raises(ValueError, match=f"^{option[0]} .*has no effect .*{why}"):
        _refuse_idle(args, engine, accelerated)
    args = parse(*NEEDED["benchmark"])
    assert not isinstance(args, str)
    _refuse_idle(args, engine, accelerated)


@pytest.mark.parametrize(
    "options_",
    [
        ["--backend", "vllm", "--batch-size", "4"],
        ["--max-model-len", "64"],
        ["--no-cache", "--cache", "x"],
    ],
)
def test_hostile_option_of_another_backend(
    options_: list[str], hostile_input: Callable[[], None]
) -> None:
    hostile_input()
    args = parse(*NEEDED["evaluate"], *options_)
    assert not isinstance(args, str)
    with pytest.raises(ValueError, match=r"^--\S+ \S+: has no effect with --"):
        run_evaluate(args)
