# SPDX-License-Identifier: Apache-2.0
"""Where parts of ``benchmarks/on_gpu.py`` run, and the page that they make."""

from __future__ import annotations

import functools
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_parts import (  # type: ignore[import-not-found]  # beside this script
    FIGURE_4,
    PARTS,
    Part,
)

from nbl_modifier.records.speed import SPEED_FILE_NAME, SpeedReport
from nbl_modifier.report.colours import SERIES
from nbl_modifier.report.plots import new_figure, style

__all__ = ["Kit", "is_done", "shown", "tables"]


@dataclass(frozen=True)
class Kit:
    """
    Where and how parts run.

    :param folder: for their JSON files and what they write
    :param serve: the interpreter that may have vLLM
    :param device: ``cuda`` or what else there is
    :param dry: whether commands are the small ones
    :param limit: seconds of a part
    """

    folder: Path
    serve: str
    device: str
    dry: bool
    limit: float

    def command(self, part: Part) -> list[str]:
        """Return the arguments behind the interpreter."""
        places = {
            "device": self.device,
            "out": str(self.folder / part.name),
            "serve": self.serve,
            "checkpoints": str(self.folder / "checkpoints"),
        }
        command = part.dry if self.dry else part.command
        return [_fill_in(word, places) for word in command]

    def python(self, part: Part) -> str:
        """Return the interpreter that runs a part."""
        return self.serve if part.in_vllm else sys.executable

    def file(self, part: Part) -> Path:
        """Return where a part's result is kept."""
        return self.folder / f"{part.name}.json"

    def why_not(self, part: Part) -> str | None:
        """Return why a part cannot run here, or None."""
        if self.dry:
            # Rows that differ in their shapes only are one command here.
            first = next((each for each in PARTS if each.dry == part.dry), part)
            if not part.dry:
                return "there is no small shape of it"
            if first is not part:
                return "another row runs the same at a small shape"
        elif torch.accelerator.device_count() < part.gpus:
            return f"needs {part.gpus} GPU" + "s" * (part.gpus > 1)
        for package in part.needs:
            python = self.serve if package == "vllm" else sys.executable
            if not _has(python, package):
                return f"{python} has no {package}"
        return None


def _fill_in(word: str, places: dict[str, str]) -> str:
    # Not str.format: some words are JSON.
    for name, value in places.items():
        word = word.replace(f"{{{name}}}", value)
    return word


@functools.cache
def _has(python: str, package: str) -> bool:
    look = f"import importlib.util as u, sys; sys.exit(not u.find_spec({package!r}))"
    return subprocess.run([python, "-c", look], check=False).returncode == 0


def shown(part: Part) -> str:
    """Return a part's command for a reader."""
    words = " ".join(
        word if word.startswith("{") and word.endswith("}") else shlex.quote(word)
        for word in part.command
    )
    return f"python {words}"


def is_done(kit: Kit, part: Part) -> bool:
    """Return whether a part was run to its end by the command that it has now."""
    path = kit.file(part)
    if not path.exists():
        return False
    result = json.loads(path.read_text("utf-8"))
    same: bool = result["command"] == kit.command(part)
    return same and result["exit_code"] == 0


def tables(kit: Kit, parts: Sequence[Part]) -> str:
    """
    Return all parts as Markdown, by table.

    :param kit: whose folder has the results
    :param parts: in the order of the page
    """
    lines: list[str] = []
    table = None
    for part in parts:
        if part.table != table:
            table = part.table
            lines += [f"## {table}", ""]
            if part.name.startswith(FIGURE_4) and figure_4(kit, parts):
                lines += [f"![{table}]({FIGURE_4}.svg)", ""]
        lines += [f"### {part.row}", "", "```bash", shown(part), "```", ""]
        lines += [_outcome(kit, part), ""]
    return "\n".join(lines)


def _outcome(kit: Kit, part: Part) -> str:
    if not kit.file(part).exists():
        reason = kit.why_not(part)
        return "not run" if reason is None else f"not run: {reason}"
    result = json.loads(kit.file(part).read_text("utf-8"))
    where = f"{result['device']}, {result['seconds']:.0f} s: "
    if result["exit_code"] is None:
        return f"{where}not done in {kit.limit:.0f} s\n\n{result['output']}".strip()
    if result["exit_code"] != 0:
        end = f"```\n{result['errors']}\n```"
        return f"{where}failed with exit code {result['exit_code']}\n\n{end}"
    return f"{where}\n\n{result['output']}"


def figure_4(kit: Kit, parts: Sequence[Part]) -> bool:
    """
    Draw prefill's speed over the base model's against the context length.

    :return: whether there was anything to draw
    """
    reports = [
        SpeedReport.load(path)
        for part in parts
        if part.name.startswith(FIGURE_4) and is_done(kit, part)
        for path in sorted((kit.folder / part.name).rglob(SPEED_FILE_NAME))
    ]
    if not reports:
        return False
    figure = new_figure(3.2)
    axes = figure.subplots()
    for report, colour in zip(reports, SERIES, strict=False):
        rows = [row for row in report.rows if row.phase == "prefill"]
        contexts = [row.context for row in rows]
        label = f"{len(report.compressed.linearized)} of {report.base.num_layers}"
        axes.plot(contexts, [r.ratio for r in rows], "o-", color=colour, label=label)
        predicted = [row.predicted_ratio for row in rows]
        axes.plot(contexts, predicted, ":", color=colour)
    style(axes)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("prefill, times base (dotted: predicted)")
    axes.legend(frameon=False)
    figure.savefig(kit.folder / f"{FIGURE_4}.svg")
    return True
