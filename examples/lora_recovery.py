# SPDX-License-Identifier: Apache-2.0
"""
Train LoRA adapters on the linear layers that NBL put in, and merge them (paper, F.2).

Prints the held-out perplexity of the base model, after NBL, and after NBL and LoRA; the
last is saved as an ordinary linearized checkpoint, which vLLM serves and quantizers
take::

    python examples/lora_recovery.py --output pycode-4m-NBL6-LoRA

Starts from --checkpoint, which is made of --base if it does not exist. Minutes on two
CPU cores; for a model of your own name --base, --checkpoint, --dataset and --heldout.
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from nbl_modifier import NBLModifier
from nbl_modifier.architectures import architecture_of
from nbl_modifier.cli.logs import show_ours_and_warnings
from nbl_modifier.evaluation import PerplexityResult, perplexity
from nbl_modifier.evaluation.texts import STDLIB, load_texts
from nbl_modifier.evaluation.token_windows import pack
from nbl_modifier.hf.checkpoint import check_output_directory
from nbl_modifier.hf.modeling_nbl import LinearizedAttention, LinearizedBlock
from nbl_modifier.llmcompressor_plugin.saving import publish, report_of

MODEL = Path(__file__).parent / "models" / "pycode-4m"


def arguments() -> argparse.Namespace:
    """Return the command line; training defaults are the paper's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", default=str(MODEL), help="model that the checkpoint is made of")
    add("--checkpoint", default="pycode-4m-NBL6", help="linearized, not quantized")
    add("--num-layers", type=int, default=6, help="for a checkpoint made here")
    add("--output", required=True, help="directory for the merged checkpoint")
    add("--dataset", default=STDLIB, help="training text: 'stdlib', a file or a folder")
    add("--heldout", default=STDLIB, help="the same, text to measure perplexity on")
    add("--target", help="regular expression of modules, default the new linear layers")
    add("--rank", type=int, default=32)
    add("--alpha", type=int, default=64)
    add("--dropout", type=float, default=0.1)
    add("--learning-rate", type=float, default=1e-4)
    add("--epochs", type=float, default=3)
    add("--num-windows", type=int, default=1024, help="windows of text per epoch")
    add("--heldout-windows", type=int, default=256)
    add("--seq-length", type=int, default=256, help="tokens per window")
    add("--batch-size", type=int, default=8)
    add("--seed", type=int, default=0)
    add("--control", action="store_true", help="train --base as much, to compare")
    return parser.parse_args()


def load(model: str, dtype: Any = "auto") -> Any:
    """Return a causal language model, in the dtype it was saved in unless told."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is computed."""
    architecture = architecture_of(AutoConfig.from_pretrained(args.base).model_type)
    check_output_directory(args.output, architecture)
    if not Path(args.checkpoint).exists():
        return
    config = AutoConfig.from_pretrained(args.checkpoint)
    if config.model_type != architecture.nbl_model_type:
        raise SystemExit(
            f"--checkpoint {args.checkpoint} is no linearized --base {args.base}: its "
            f"model_type is {config.model_type!r}, not {architecture.nbl_model_type!r}."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise SystemExit(
            f"--checkpoint {args.checkpoint} is quantized, so adapters cannot be "
            "merged into it. Train first, then quantize what this script saves."
        )


def linearize(args: argparse.Namespace, tokenizer: Any, rows: Dataset) -> None:
    """Write the checkpoint to start from."""
    oneshot(
        model=args.base,
        processor=tokenizer,
        dataset=rows,
        recipe=NBLModifier(num_layers=args.num_layers),
        num_calibration_samples=min(256, len(rows)),
        shuffle_calibration_samples=False,
        max_seq_length=args.seq_length,
        batch_size=args.batch_size,
        output_dir=args.checkpoint,
    )


def new_linears(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers that NBL put in."""
    return [
        f"{name}.{child}"
        for name, module in model.named_modules()
        if isinstance(module, LinearizedAttention | LinearizedBlock)
        for child, linear in module.named_modules()
        if isinstance(linear, nn.Linear)
    ]


def output_projections(nbl: PreTrainedModel) -> list[str]:
    """Return the names, in the base model, of what ended each replaced attention."""
    architecture = architecture_of(nbl.config.model_type)
    layers = nbl.config.linearized_layers()
    return [f"{architecture.attention_name(index)}.o_proj" for index in layers]


def train(
    args: argparse.Namespace, name: str, targets: list[str] | str, rows: Dataset
) -> Any:
    """Train adapters in float32 and return the model with the adapters merged."""
    model = load(name, torch.float32)
    set_seed(args.seed)
    adapters = LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, adapters)
    peft_model.print_trainable_parameters()
    print(f"{len(rows) * args.seq_length:,} tokens, {args.epochs:g} times", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            seed=args.seed,
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
        )
        labelled = rows.add_column("labels", rows["input_ids"])
        Trainer(peft_model, settings, train_dataset=labelled).train()
    return peft_model.merge_and_unload()


def save(args: argparse.Namespace, model: Any, tokenizer: Any, tokens: int) -> None:
    """Write the merged model as a linearized checkpoint, with its report."""
    report = report_of(model)
    if report is not None:
        note = (
            f"LoRA (rank {args.rank}, alpha {args.alpha}, dropout {args.dropout}) on "
            f"{args.target or 'the new linear layers'}, learning rate "
            f"{args.learning_rate}, {args.epochs:g} epochs of {tokens:,} tokens of "
            f"{args.dataset}, seed {args.seed}; merged"
        )
        # Figures from before the training do not hold any more.
        report = dataclasses.replace(report, training=note, evaluation=None)
    reset_session()  # the recipe that made the checkpoint is not to be listed again
    publish(model, architecture_of(model.config.model_type), report=lambda: report)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


def print_table(rows: dict[str, PerplexityResult]) -> None:
    """Print perplexities, each with its ratio to the second row's, NBL's."""
    nbl = rows["NBL"]
    print(f"\nperplexity on {nbl.num_tokens:,} held-out tokens")
    for name, result in rows.items():
        ratio, error = result.relative_to(nbl)
        print(f"  {name:<11} {result.perplexity:8.3f}   ", end="")
        print(f"{ratio:.4f} +- {error:.4f} times NBL")


def main() -> int:
    """Linearize, train, merge, save and measure."""
    args = arguments()
    show_ours_and_warnings()
    check(args)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    rows, heldout = (
        pack(load_texts(source, split), tokenizer, args.seq_length, num_windows)
        for source, split, num_windows in (
            (args.dataset, "calibration", args.num_windows),
            (args.heldout, "heldout", args.heldout_windows),
        )
    )
    if not Path(args.checkpoint).exists():
        linearize(args, tokenizer, rows)

    start = load(args.checkpoint)
    results = {
        "base": perplexity(load(args.base), heldout),
        "NBL": perplexity(start, heldout),
    }
    model = train(args, args.checkpoint, args.target or new_linears(start), rows)
    save(args, model.to(start.dtype), tokenizer, len(rows) * args.seq_length)
    results["NBL + LoRA"] = perplexity(load(args.output), heldout)
    if args.control:
        model = train(args, args.base, output_projections(start), rows)
        results["base + LoRA"] = perplexity(model.to(start.dtype), heldout)
    print_table(results)
    print(f"saved: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
