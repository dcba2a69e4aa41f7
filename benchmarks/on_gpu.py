# SPDX-License-Identifier: Apache-2.0
"""
Measure on a GPU what the documentation says was not run, in one go.

    pip install --no-deps -r requirements/gpu.txt      (beside torch and transformers)
    pip install --no-deps .
    python benchmarks/on_gpu.py --output gpu_results

Every row is a part of at most eight minutes in a process of its own, and leaves one
JSON file. Started again, the command goes on with the parts that are missing. After
each part ``tables.md`` holds all of them, with their commands, and the plots that the
paper has. Parts that need vLLM run where it can be imported, here or in the interpreter
of ``--serve-python``. ``--list`` prints all rows with their commands, and ``--dry-run``
runs them on a CPU, at shapes that take seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, Part  # type: ignore[import-not-found]  # beside this script
from gpu_tables import (  # type: ignore[import-not-found]
    Kit,
    is_done,
    shown,
    tables,
)

from nbl_modifier.benchmark.machine import current_device, device_name
from nbl_modifier.records.files import write_atomically
from nbl_modifier.records.provenance import utc_timestamp
from nbl_modifier.records.speed import SPEED_FILE_NAME

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 480
PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "vllm")
# Of what a part prints to standard error: its end, which says why it failed.
ERROR_LINES = 30


def run(kit: Kit, part: Part) -> dict[str, Any]:
    """
    Run a part and return its result, which is written, too.

    :return: ``part``, ``row`` and ``table``; ``command``; ``exit_code``, None after the
        time limit; ``seconds``; ``output`` and the end of ``errors``; ``speed``, what
        ``nbl benchmark`` found; ``device``, ``versions`` and ``created``
    """
    started_at = time.perf_counter()
    # The dry run of all parts is a test, which cannot wait for imports over and over.
    start = _in_this_process if kit.dry and not part.in_vllm else _in_a_process
    exit_code, output, errors = start(kit, part)
    result = {
        "part": part.name,
        "table": part.table,
        "row": part.row,
        "command": kit.command(part),
        "exit_code": exit_code,
        "seconds": round(time.perf_counter() - started_at, 1),
        "output": output.strip(),
        "errors": "\n".join(errors.splitlines()[-ERROR_LINES:]),
        "speed": [
            json.loads(path.read_text("utf-8"))
            for path in sorted((kit.folder / part.name).rglob(SPEED_FILE_NAME))
        ],
        "device": device_name(kit.device),
        "python": platform.python_version(),
        "versions": _versions(),
        "created": utc_timestamp(),
    }
    write_atomically(kit.file(part), json.dumps(result, indent=2) + "\n")
    return result


def _in_a_process(kit: Kit, part: Part) -> tuple[int | None, str, str]:
    command = [kit.python(part), *kit.command(part)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(paths), "NBL_SERVE_PYTHON": kit.serve},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=kit.limit)
        return process.returncode, output, errors
    except subprocess.TimeoutExpired:
        return None, *_stop(process)
    except BaseException:
        _stop(process)
        raise


def _stop(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a process and all that it started; return what they had printed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()


def _in_this_process(kit: Kit, part: Part) -> tuple[int | None, str, str]:
    script, *arguments = kit.command(part)
    output, errors = io.StringIO(), io.StringIO()
    before, environment = sys.argv, dict(os.environ)
    code: Any = 0
    try:
        sys.argv = [script, *arguments]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
        os.environ.clear()  # scripts set what their packages read
        os.environ.update(environment)
    return code, output.getvalue(), errors.getvalue()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", default="gpu_results", help="folder for results (gpu_results)")
    add("--only", help="parts by the beginnings of their names, a list")
    add(
        "--serve-python",
        default=sys.executable,
        help="interpreter that has vLLM and this package (this one)",
    )
    add("--list", action="store_true", help="print all rows with their commands")
    add("--dry-run", action="store_true", help="small shapes, on a CPU")
    add("--limit", type=float, default=LIMIT_SECONDS, help="seconds of a part (480)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run what is missing, print a line for each part; 1 if any of them failed.

    :param arguments: the command line; None: this process's
    """
    args = parse_args(arguments)
    names = tuple((args.only or "").split(","))
    parts = [part for part in PARTS if part.name.startswith(names)]
    if args.list:
        for part in parts:
            print(f"{part.name}: {part.table}: {part.row}\n    {shown(part)}")
        return 0
    kit = Kit(
        folder=Path(args.output).resolve(),
        serve=args.serve_python,
        device="cpu" if args.dry_run else current_device(),
        dry=args.dry_run,
        limit=args.limit,
    )
    kit.folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for part in parts:
        print(f"{part.name}: {part.table}: {part.row}\n    {shown(part)}", flush=True)
        reason = kit.why_not(part)
        if reason is not None:
            print(f"    not run: {reason}", flush=True)
            continue
        if is_done(kit, part):
            print("    done before", flush=True)
            continue
        result = run(kit, part)
        code = result["exit_code"]
        failed |= code not in (0, None)
        end = "not done" if code is None else "done" if code == 0 else "FAILED"
        print(f"    {end} after {result['seconds']} s", flush=True)
        write_atomically(kit.folder / "tables.md", tables(kit, parts))
    write_atomically(kit.folder / "tables.md", tables(kit, parts))
    print(f"written: {kit.folder / 'tables.md'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
