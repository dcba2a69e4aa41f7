# SPDX-License-Identifier: Apache-2.0
"""
Is the linear map worth having, or would removing attention do as well?

Prints the perplexity of the base model, after NBL, and after attention DROP of the same
layers (attention output 0 there, as in LLM-Drop), for both ranking criteria::

    python benchmarks/nbl_vs_drop.py
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nbl_modifier import NBLModifier
from nbl_modifier.cli.logs import show_ours_and_warnings
from nbl_modifier.evaluation import PerplexityResult, perplexity
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack
from nbl_modifier.records.compression import REPORT_FILE_NAME, NBLReport

Criterion = Literal["cca_bound", "nmse"]
MODEL = Path(__file__).resolve().parents[1] / "examples" / "models" / "pycode-4m"


def load(model: str) -> PreTrainedModel:
    """Return the model in the dtype it was saved in."""
    return AutoModelForCausalLM.from_pretrained(model, dtype="auto")


def drop_attention(model: PreTrainedModel, layers: list[int]) -> None:
    """
    Make the attention of ``layers`` contribute nothing to the residual stream.

    :param model: Llama-architecture model, changed in place
    :param layers: layer numbers from 0
    """

    def zero(module: torch.nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
        return (torch.zeros_like(output[0]), *output[1:])

    for index in layers:
        model.model.layers[index].self_attn.register_forward_hook(zero)


def linearize(
    args: argparse.Namespace,
    criterion: Criterion,
    tokenizer: Any,
    calibration: Dataset,
) -> tuple[PreTrainedModel, list[int]]:
    """Return the model after NBL, and the layers it chose."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = oneshot(
            model=load(args.model),
            processor=tokenizer,
            dataset=calibration,
            recipe=NBLModifier(num_layers=args.num_layers, criterion=criterion),
            output_dir=folder,
            num_calibration_samples=len(calibration),
            shuffle_calibration_samples=False,
            batch_size=args.batch_size,
        )
        report = NBLReport.load(Path(folder) / REPORT_FILE_NAME)
    return model, report.selected_layers


def print_row(name: str, result: PerplexityResult, base: PerplexityResult) -> None:
    """Print one perplexity and its ratio to the base model's."""
    ratio, error = result.relative_to(base)
    print(f"{name:<34} {result.perplexity:8.3f}   {ratio:.4f} +- {error:.4f}")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--heldout-samples", type=int, default=256)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    show_ours_and_warnings()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts, other_texts = stdlib_texts("calibration"), stdlib_texts("heldout")
    calibration = pack(texts, tokenizer, args.seq_length, args.num_samples)
    heldout = pack(other_texts, tokenizer, args.seq_length, args.heldout_samples)

    base = perplexity(load(args.model), heldout, args.batch_size)
    rows = [("base", base)]
    criteria: tuple[Criterion, ...] = ("cca_bound", "nmse")
    for criterion in criteria:
        model, layers = linearize(args, criterion, tokenizer, calibration)
        rows += [(f"NBL  {criterion} {layers}", perplexity(model, heldout))]
        dropped = load(args.model)
        drop_attention(dropped, layers)
        rows += [(f"DROP {criterion} {layers}", perplexity(dropped, heldout))]
    print(f"\n{'perplexity':<34} {base.num_tokens:,} tokens   times base")
    for name, result in rows:
        print_row(name, result, base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
