# SPDX-License-Identifier: Apache-2.0
"""
NBL beside a quantized KV cache: what each costs in quality, and what fits in memory.

In the serve environment, whose vLLM has the formats:

    .venv/serve/bin/python benchmarks/kv_quantization.py --model MODEL \\
        --checkpoint NAME=FOLDER ... --text NAME=FILE ... --json results.json

Quality is that of a model which reads every key and value back as the format stores
it: in transformers, since vLLM's CPU build has kernels for FP8 only (``--served`` asks
real vLLM for that one, too). Formats follow ``--kv-cache-dtype`` of vLLM 0.32, with
vLLM's own rotations and centroids. Capacity is what vLLM's code makes of the layers'
sizes; ``--served`` prints what an engine says.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import torch

from benchmarks.kv_formats import FORMATS, quantize_cache
from benchmarks.paper_texts import load_windows, named_source
from nbl_modifier.evaluation import perplexity
from nbl_modifier.worker import Connection, answer_of

BLOCK_SIZE = 128  # vLLM's on CPUs
MAX_LENGTH = 2048


def capacity(folder: Path, name: str) -> int:
    """
    Return the tokens that fit in 1 GiB by vLLM's own code.

    :param folder: checkpoint
    :param name: of the format
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
    from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, get_kv_cache_configs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    engine: Any = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=MAX_LENGTH,
        block_size=BLOCK_SIZE,
    ).create_engine_config()
    # TurboQuant's only one; blocks are as large in any.
    engine.cache_config.kv_cache_layout = "LBNHC"
    config = engine.model_config.hf_config
    quantizes = {"int8_per_token_head": torch.int8}
    specs = {}
    protects = FORMATS[name].protects
    for index in range(config.num_hidden_layers):
        if index in getattr(config, "linearized_layers", dict)():
            continue
        inside = protects <= index < config.num_hidden_layers - protects
        of = name if inside else "auto"
        stored = torch.bfloat16 if of == "auto" else quantizes.get(of, torch.uint8)
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE,
            num_kv_heads=config.num_key_value_heads,
            head_size=config.head_dim,
            dtype=stored,
            kv_quant_mode=get_kv_quant_mode(of),
        )
        backends = TritonAttentionBackend, TurboQuantAttentionBackend
        for backend in backends:  # each knows its own formats only
            spec = backend.customize_spec(spec)
        specs[f"model.layers.{index}.self_attn.attn"] = spec
    (made,) = get_kv_cache_configs(engine, [specs], [2**30])
    return int(get_kv_cache_capacity(engine, made)[0])


def served(job: tuple[str, str, list[list[int]]], connection: Connection) -> None:
    """
    Answer with what an engine of vLLM prints and computes.

    :param job: checkpoint, name of the format, and windows of token ids
    :param connection: gets the capacity, tokens, and nat per token
    """
    folder, name, windows = job
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder,
        dtype="bfloat16",
        kv_cache_dtype=name,
        enforce_eager=True,
        max_model_len=MAX_LENGTH,
        max_num_batched_tokens=MAX_LENGTH,
        max_num_seqs=4,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": window} for window in windows]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    nats = [
        -table[token].logprob
        for output in outputs
        for token, table in zip(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
        )
    ]
    tokens = engine.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    connection.send((tokens, sum(nats) / len(nats)))


def measure(
    models: dict[str, Path], heldout: dict[str, Any], is_served: bool
) -> Iterable[dict[str, Any]]:
    """
    Yield one row per model and format.

    :param models: checkpoints by name, the base model first
    :param heldout: windows by name of the text
    :param is_served: whether vLLM runs what it can
    """
    from transformers import AutoModelForCausalLM

    from nbl_modifier.hf import register

    register()
    first: dict[str, Any] = {}
    for label, folder in models.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, stored in FORMATS.items():
            quantize_cache(model, stored)
            row: dict[str, Any] = {"model": label, "kv_cache": name, "times_base": {}}
            for text, windows in heldout.items():
                result = perplexity(model, windows)
                first.setdefault(text, result)
                row["times_base"][text] = result.relative_to(first[text])
            row["capacity"] = capacity(folder, name)
            if is_served and name in ("auto", "fp8"):
                ids = [
                    window for each in heldout.values() for window in each["input_ids"]
                ]
                tokens, nats = answer_of(
                    served,
                    (str(folder), name, ids),
                    subject=f"vLLM on {folder} with {name}",
                    show_output=True,
                    show_errors=True,
                )
                row |= {"served_capacity": tokens, "served_nats": nats}
            yield row


def line(row: dict[str, Any], base: dict[str, Any]) -> str:
    """
    Return a row of the table.

    :param row: of :func:`measure`
    :param base: the first one
    """
    ratios = [f"{ratio:.4f} ± {se:.4f}" for ratio, se in row["times_base"].values()]
    times = row["capacity"] / base["capacity"]
    shown = [
        row["model"],
        row["kv_cache"],
        *ratios,
        f"{row['capacity']:,} ({times:.2f})",
    ]
    if "served_nats" in base:
        said = "not on CPUs"
        if "served_nats" in row:
            ratio = math.exp(row["served_nats"] - base["served_nats"])
            said = f"{ratio:.4f}, {row['served_capacity']:,}"
        shown.append(said)
    return f"| {' | '.join(shown)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--checkpoint", action="append", default=[], metavar="NAME=FOLDER")
    add("--calibration", type=named_source, required=True, metavar="NAME=FILE")
    add("--text", type=named_source, action="append", default=[], metavar="NAME=FILE")
    add("--windows", type=int, default=48)
    add("--seq-len", type=int, default=512)
    add("--served", action="store_true", help="run in vLLM what its CPU build can")
    add("--json", type=Path)
    args = parser.parse_args()

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it logs to stdout
    from transformers import AutoTokenizer

    models = {"base": args.model}
    for each in args.checkpoint:
        name, _, folder = each.partition("=")
        models[name] = Path(folder)
    heldout = load_windows(
        args.calibration,
        args.text,
        AutoTokenizer.from_pretrained(args.model),
        samples=1,
        heldout_windows=args.windows,
        seq_len=args.seq_len,
        seed=0,
    ).heldout
    headings = ["model", "KV cache", *(f"{text}, times base" for text in heldout)]
    headings.append("tokens in 1 GiB")
    if args.served:
        headings.append("in vLLM")
    print(f"| {' | '.join(headings)} |")
    print(f"|---|---|{'---:|' * (len(headings) - 2)}")
    rows: list[dict[str, Any]] = []
    for row in measure(models, heldout, args.served):
        rows.append(row)
        print(line(row, rows[0]), flush=True)
        if args.json:
            text = json.dumps({"windows": args.windows, "rows": rows}, indent=2)
            args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
