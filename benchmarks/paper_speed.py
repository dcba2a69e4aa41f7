# SPDX-License-Identifier: Apache-2.0
"""
The paper's inference speeds: 2048 tokens in, 2048 out, batch 1, transformers with eager
attention (arXiv:2505.21077, Section 4), here with a real KV cache.

Models of the given shape with random weights, since speed does not depend on them: the
base, and the same with its last m attention layers linear, for each m. Only their
configs are written; ``nbl benchmark --random-weights`` does the rest. Any other option
of that command can follow::

    python benchmarks/paper_speed.py --shape 1b --repeats 3
    python benchmarks/paper_speed.py --shape 8b                  (on a GPU)
    python benchmarks/paper_speed.py --shape 135m --linearized 15 --engine vllm \\
        --context 512,2048,8192 --batch 1,8
    python benchmarks/paper_speed.py --shape 8b --linearized 12 --engine vllm \\
        --scheme W4A16                                           (on a GPU)
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.cli import main as nbl
from nbl_modifier.hf.configuration_nbl import (
    LinearizedLayer,
    config_class,
    nbl_config_block,
)

_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
SHAPES: dict[str, dict[str, Any]] = {
    # Llama-3.1-8B
    "8b": _LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    # Llama-3.2-1B
    "1b": _LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    # SmolLM2-135M, for a grid that a CPU gets through
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8448,
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
    },
    # for trying this script
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "dtype": "float32",
    },
}
# As llm-compressor writes them: what vLLM needs to know to make such weights up.
SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": {
        "format": "pack-quantized",
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 128,
        },
    },
    "FP8_DYNAMIC": {
        "format": "float-quantized",
        "weights": {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "channel",
        },
        "input_activations": {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        },
    },
}


def save_config(
    folder: Path, shape: str, num_linear: int, scheme: str | None = None
) -> Path:
    """
    Write the ``config.json`` of a model without weights.

    :param folder: directory to be
    :param shape: a key of ``SHAPES``
    :param num_linear: how many of the last layers have linear attention
    :param scheme: a key of ``SCHEMES``, for all linear layers but the head
    """
    fields = dict(SHAPES[shape])
    if scheme is not None:
        group = {"targets": ["Linear"], **SCHEMES[scheme]}
        fields["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": group["format"],
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
    if num_linear == 0:
        LlamaConfig(**fields, architectures=["LlamaForCausalLM"]).save_pretrained(
            folder
        )
        return folder
    llama, num_layers = ARCHITECTURES["llama"], fields["num_hidden_layers"]
    layers = {
        index: LinearizedLayer(input="residual")
        for index in range(num_layers - num_linear, num_layers)
    }
    config: Any = config_class(llama)(**fields, architectures=[llama.nbl_causal_lm])
    config.nbl_config = nbl_config_block(layers)
    config.save_pretrained(folder)
    return folder


def save_draft(folder: Path, shape: str) -> Path:
    """
    Write the ``config.json`` of an EAGLE-3 head without weights, as wide as the model.

    :param folder: directory to be
    :param shape: of the model that it drafts for, a key of ``SHAPES``
    """
    fields = SHAPES[shape] | {"num_hidden_layers": 1, "tie_word_embeddings": False}
    # what published heads have
    fields["draft_vocab_size"] = min(32000, fields["vocab_size"])
    LlamaConfig(**fields, architectures=["LlamaForCausalLMEagle3"]).save_pretrained(
        folder
    )
    return folder


def speculation(draft: Path, args: argparse.Namespace) -> dict[str, Any]:
    """
    Return vLLM's settings for drafts of which as many are taken as is said.

    The draft model's weights are random; how often it is right is not measured.
    """
    return {
        "speculative_config": {
            "method": "eagle3",
            "model": str(draft),
            "num_speculative_tokens": args.draft_tokens,
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_length": args.accepted,
        }
    }


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """Return the command line, and what of it is for ``nbl benchmark``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument(
        "--linearized", default="4,8,12,16", help="values of m, a list (4,8,12,16)"
    )
    parser.add_argument(
        "--scheme", choices=sorted(SCHEMES), help="quantize base and NBL (in vLLM)"
    )
    parser.add_argument(
        "--draft-tokens",
        type=int,
        default=0,
        help="tokens that an EAGLE-3 head drafts per step, for both (in vLLM)",
    )
    parser.add_argument(
        "--accepted",
        type=float,
        default=3.0,
        help="tokens per step then, the model's own included (3.0)",
    )
    parser.add_argument("--output", help="folder for one folder of results per m")
    return parser.parse_known_args()


def main() -> int:
    """Measure each m against the base model; the last exit code that is not 0."""
    args, others = parse_args()
    code = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        name = f"llama-{args.shape}"
        base = save_config(folder / name, args.shape, 0, args.scheme)
        if args.draft_tokens:
            draft = save_draft(folder / "draft", args.shape)
            others += ["--engine-args", json.dumps(speculation(draft, args))]
        for count in map(int, args.linearized.split(",")):
            linear = f"{name}-nbl{count}"
            model = save_config(folder / linear, args.shape, count, args.scheme)
            command = ["benchmark", str(model), "--baseline", str(base)]
            command += ["--suite", "paper", "--random-weights", *others]
            if args.output:
                command += ["--output", str(Path(args.output) / linear)]
            print(f"\n## m = {count}\n", flush=True)
            code = nbl(command) or code
    return code


if __name__ == "__main__":
    sys.exit(main())
