# SPDX-License-Identifier: Apache-2.0
"""
The quick start: compress a small trained model, then generate from it in vLLM.

Two commands because llm-compressor and vLLM live in different environments::

    python examples/demo.py compress --output demo_output    (where llm-compressor is)
    python examples/demo.py serve demo_output                (where vLLM is)

`make demo` runs both. The model is a 16-layer Llama of 3.7 M parameters trained on
Python source; calibration and held-out text come from Python's standard library, so
nothing is downloaded.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from nbl_modifier.cli import main as nbl

ROOT = Path(__file__).resolve().parents[1]
# Relative to where one stands, so that reports name no home directory.
MODEL = os.path.relpath(ROOT / "examples" / "models" / "pycode-4m")
RECIPES = {
    "pycode-4m-nbl4": ROOT / "recipes" / "nbl.yaml",
    "pycode-4m-nbl4-w4a16": ROOT / "recipes" / "nbl_gptq_w4a16.yaml",
}
# The model was trained on windows of 256 tokens. Its tokenizer leaves it to the caller
# to start a text with <s>.
SEQ_LENGTH = 256
PROMPT = """<s>import json


def load(path):
    with open(path) as"""


def compress(output: Path) -> int:
    """Save one checkpoint with linear layers, and one that is quantized as well."""
    for name, recipe in RECIPES.items():
        print(f"=== {name}: {recipe.relative_to(ROOT)} ===", flush=True)
        start = time.perf_counter()
        code = nbl(
            [
                *("compress", MODEL, "--recipe", str(recipe)),
                *("--output", str(output / name), "--overwrite"),
                *("--dataset", "stdlib", "--max-seq-length", str(SEQ_LENGTH)),
                *("--num-samples", "256", "--batch-size", "8"),
            ]
        )
        if code:
            return code
        print(f"took {time.perf_counter() - start:.0f} s\n", flush=True)
    return 0


def serve(output: Path) -> int:
    """Print KV-cache capacity and a completion, base model first."""
    models = [MODEL, *(str(output / name) for name in RECIPES)]
    return nbl(["generate", *models, "--prompt", PROMPT, "--max-tokens", "40"])


def main() -> int:
    """Run one half of the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    halves = parser.add_subparsers(dest="half", required=True)
    halves.add_parser("compress").add_argument("--output", type=Path, required=True)
    halves.add_parser("serve").add_argument("output", type=Path)
    args = parser.parse_args()
    return {"compress": compress, "serve": serve}[args.half](args.output)


if __name__ == "__main__":
    sys.exit(main())
