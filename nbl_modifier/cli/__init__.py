# SPDX-License-Identifier: Apache-2.0
"""The command ``nbl``. Each subcommand imports what it needs when it runs."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import benchmark, compress, evaluate, generate, rank, report
from .options import Parser

_DESCRIPTION = """\
Neural Block Linearization: replace attention layers of a language model by linear
maps with llm-compressor, serve the result with vLLM.
"""

_EPILOG = """\
example:
  nbl compress meta-llama/Llama-3.1-8B --recipe recipes/nbl_gptq_w4a16.yaml \\
      --dataset c4 --output Llama-3.1-8B-NBL-W4A16      (where llm-compressor is)
  nbl generate meta-llama/Llama-3.1-8B Llama-3.1-8B-NBL-W4A16 \\
      --prompt "The KV cache of"                        (where vLLM is)
  nbl benchmark Llama-3.1-8B-NBL-W4A16 --baseline meta-llama/Llama-3.1-8B

"nbl COMMAND --help" explains the options of a command.
"""

# What bad input, a full disk or a missing package raises. Anything else is a bug and
# keeps its traceback.
_EXPECTED = (ValueError, NotImplementedError, OSError, ImportError, RuntimeError)


class _Version(argparse.Action):
    """Prints the installed version; looked up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print and exit."""
        from nbl_modifier import __version__

        print(f"{parser.prog} {__version__}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    :param argv: arguments without the program name; None for those of the process
    :return: exit code: 0, or 2 when the input or the environment is at fault
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    # llm-compressor and tokenizers each warn about it otherwise
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        args.run(args)
    except _EXPECTED as err:
        if args.debug:
            raise
        print(f"nbl: error: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nbl: interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="nbl",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action=_Version, help="print the version of nbl-modifier and exit"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    rank.add_parser(commands)
    compress.add_parser(commands)
    evaluate.add_parser(commands)
    generate.add_parser(commands)
    benchmark.add_parser(commands)
    report.add_parser(commands)
    for command in commands.choices.values():
        command.add_argument(
            "--debug", action="store_true", help="show tracebacks and all logs"
        )
    return parser
