# SPDX-License-Identifier: Apache-2.0
"""``nbl report``: one page about everything that was measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import path

_DESCRIPTION = """\
Make one HTML page, and the same as Markdown, from the JSON reports in folders: quality
of checkpoints and of methods, quality against speed and against KV cache, the size of
the KV cache, rankings, layers that each criterion would choose, and canonical
correlations. The page needs no network and follows the reader's light or dark theme.
"""
_EPILOG = """\
example:
  nbl report Llama-3.1-8B-NBL4 Llama-3.1-8B-NBL12 --output report.html

reads nbl_report.json, nbl_evaluation.json, nbl_benchmark.json, nbl_methods.json,
nbl_measurements.json and nbl_ranking.json (docs/report.md)
"""


def add_parser(commands: Any) -> None:
    """
    Add the command to the parser's subcommands.

    :param commands: what ``ArgumentParser.add_subparsers`` returned
    """
    parser = commands.add_parser(
        "report",
        help="one HTML page from the JSON reports of checkpoints",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        type=_path,
        metavar="DIR",
        help="checkpoint, or a folder of them; a single JSON file does too",
    )
    add(
        "--output",
        type=_path,
        default=Path("nbl_report.html"),
        metavar="FILE",
        help="page to write; the Markdown goes beside it (default: nbl_report.html)",
    )


def _path(value: str) -> Path:
    return Path(path(value))


def run(args: argparse.Namespace) -> None:
    """
    Run the command.

    :param args: parsed by the parser of ``add_parser``
    :raises FileNotFoundError: if a path does not exist
    :raises ValueError: if there is no report, a file cannot be read, or the output
        cannot be written there
    :raises ImportError: if matplotlib is not installed
    """
    from nbl_modifier.records.files import write_atomically
    from nbl_modifier.records.provenance import utc_timestamp
    from nbl_modifier.report.collect import collect
    from nbl_modifier.report.page import render_html, render_markdown
    from nbl_modifier.report.sections import group_sections

    page = args.output
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {page}: must end in .html, got {page.suffix!r}.")
    if not page.parent.is_dir():
        raise FileNotFoundError(
            f"--output {page}: there is no folder {page.parent}. Make it first."
        )
    groups = collect(args.paths)
    content = [(group.model, group_sections(group)) for group in groups]
    title = "NBL report: " + ", ".join(group.name for group in groups)
    footer = f"Made by nbl report, {utc_timestamp()}."
    write_atomically(page, render_html(title, content, footer))
    text = page.with_suffix(".md")
    write_atomically(text, render_markdown(title, content, footer))
    checkpoints = sum(len(group.checkpoints) for group in groups)
    print(f"{checkpoints} checkpoints of {len(groups)} base models")
    print(f"page: {page}, as Markdown: {text}")
