"""
What ``nbl_modifier.kv_cache`` predicts, beside what vLLM prints, for models with
several kinds of layers. In the serve environment:

    .venv/serve/bin/python benchmarks/kv_capacity.py [FAMILY ...]

Models are small, weights are not read; what counts is how many layers there are of each
kind. Exits with 1 if a prediction is more than 1 % off.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from nbl_modifier.kv_cache import Engine, KVCache

LENGTH = 4096
IN_FLIGHT = 512
BLOCK_SIZE = 128  # vLLM's on CPUs
TOLERANCE = 0.01


@dataclass(frozen=True)
class Case:
    """
    One model.

    :param family: its ``model_type``
    :param kinds: of its layers, ``F`` with full attention, ``S`` with a sliding window,
        ``R`` recurrent
    :param replaced: layers without attention
    """

    family: str
    kinds: str
    replaced: tuple[int, ...]


CASES = [
    Case("gemma2", "SF" * 6, ()),
    Case("gemma2", "SF" * 6, (1, 3)),
    Case("gemma2", "SF" * 6, (0, 1)),
    Case("gemma2", "SF" * 6, (1, 3, 5, 7)),
    Case("gemma3_text", "SSSSSF" * 2, ()),
    Case("gemma3_text", "SSSSSF" * 2, (5,)),
    Case("gemma3_text", "SSSSSF" * 2, (0, 1, 2)),
    Case("gpt_oss", "SF" * 4, ()),
    Case("gpt_oss", "SF" * 4, (1,)),
    Case("gpt_oss", "SF" * 4, (0, 1)),
    Case("olmo3", "SSSF" * 3, ()),
    Case("olmo3", "SSSF" * 3, (3,)),
    Case("olmo3", "SSSF" * 3, (0, 1, 2)),
    Case("cohere2", "SSSF" * 2, ()),
    Case("cohere2", "SSSF" * 2, (3,)),
    Case("cohere2", "SSSF" * 2, (0, 1)),
    Case("gemma4_text", "SSSSSF" * 2, ()),
    Case("gemma4_text", "SSSSSF" * 2, (5,)),
    Case("granitemoehybrid", "RRRF" * 2, ()),
    Case("granitemoehybrid", "RRRF" * 2, (3,)),
]
_NAMES = {
    "F": "full_attention",
    "S": "sliding_attention",
    "R": "linear_attention",
}


def save_config(case: Case, folder: Path) -> dict[str, Any]:
    """
    Write the configuration of a case's model.

    :param folder: where to
    :return: its content
    """
    from nbl_modifier.architectures import ARCHITECTURES
    from nbl_modifier.hf.configuration_nbl import (
        LinearizedLayer,
        config_class,
        nbl_config_block,
    )
    from tests.tiny_models import family_config

    row = ARCHITECTURES[case.family]
    config = family_config(
        case.family,
        num_layers=len(case.kinds),
        hidden_size=256,
        num_attention_heads=8,
        vocab_size=512,
        layer_types=[_NAMES[kind] for kind in case.kinds],
        max_length=LENGTH,
    )
    fields = config.to_dict() | {"architectures": [row.causal_lm], "dtype": "float32"}
    if case.replaced:
        spec = LinearizedLayer(input=row.inputs[-1])
        block = nbl_config_block(dict.fromkeys(case.replaced, spec))
        fields |= {
            "architectures": [row.nbl_causal_lm],
            "model_type": config_class(row).model_type,
            "nbl_config": block,
        }
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return fields


def serve(folder: str, queue: Any) -> None:
    """Put into ``queue`` how many tokens fit, and how many are in flight."""
    from vllm import LLM
    from vllm.model_executor.models import registry

    # It looks at a model's class in one more process, which would import all again.
    registry._run_in_subprocess = lambda look: look()
    engine = LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=LENGTH,
        max_num_batched_tokens=IN_FLIGHT,
        max_num_seqs=4,
        dtype="float32",
    )
    config = engine.llm_engine.vllm_config
    queue.put((config.cache_config.kv_cache_size_tokens, config.max_in_flight_tokens))


def main(families: list[str]) -> int:
    """
    Print the table.

    :param families: only these; all if there are none
    :return: number of predictions that are too far off, at most 1
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it logs to stdout
    from vllm import LLM  # noqa: F401  # once: what is forked below has it

    memory = int(os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")) * 2**30
    print("| family | layers | replaced | predicted | vLLM | off |")
    print("|---|---|---|---:|---:|---:|")
    wrong = False
    context = multiprocessing.get_context("fork")
    for case in CASES:
        if families and case.family not in families:
            continue
        with tempfile.TemporaryDirectory() as folder:
            config = save_config(case, Path(folder))
            queue = context.Queue()
            process = context.Process(target=serve, args=(folder, queue))
            process.start()
            process.join()
            if process.exitcode:
                print(f"| {case.family} | {case.kinds} | fails |", flush=True)
                wrong = True
                continue
            found, in_flight = queue.get()
        engine = Engine(BLOCK_SIZE, in_flight)
        cache = KVCache.from_config(config)
        predicted = cache.capacity(memory, LENGTH, engine)
        off = predicted / found - 1
        wrong |= abs(off) > TOLERANCE
        replaced = " ".join(map(str, case.replaced)) or "none"
        print(
            f"| {case.family} | {case.kinds} | {replaced} | {predicted:,} | {found:,} "
            f"| {off:+.2%} |",
            flush=True,
        )
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
