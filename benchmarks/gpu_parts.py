# SPDX-License-Identifier: Apache-2.0
"""
What ``benchmarks/on_gpu.py`` runs: the rows of docs/performance.md and docs/versions.md
that need a GPU, each by the command that measures it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["FIGURE_4", "PARTS", "Part"]

#: Parts whose speeds are drawn over the context length, the paper's Figure 4.
FIGURE_4 = "figure4"
_LINEARIZED = (4, 8, 12, 16)
_COMPRESSES, _SERVES = ("llmcompressor",), ("vllm",)


@dataclass(frozen=True)
class Part:
    """
    One command of at most eight minutes.

    In commands ``{device}`` stands for ``cuda`` or what else there is, ``{out}`` for a
    folder of the part's own, ``{serve}`` for the interpreter that has vLLM, and
    ``{checkpoints}`` for those that the part ``checkpoints`` makes.

    :param name: of its JSON file
    :param table: what it belongs to
    :param row: what is measured
    :param command: a script and its arguments, or ``-m`` and a module
    :param dry: the same at a shape that a CPU does in seconds; empty: another part
        runs the same script
    :param needs: packages without which it is not run
    :param in_vllm: whether the command runs where vLLM is, not where llm-compressor is
    :param gpus: that it needs
    """

    name: str
    table: str
    row: str
    command: tuple[str, ...]
    dry: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    in_vllm: bool = False
    gpus: int = 1


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_CALIBRATION = _split(
    "benchmarks/calibration.py --device {device} --quick --solver-d 0 --repeats 1"
)
_8B = _split(
    "--hidden-size 4096 --intermediate-size 14336 --layers 32 --heads 32 --kv-heads 8 "
    "--vocab-size 128256 --dtype bfloat16"
)
_1B = _split(
    "--hidden-size 2048 --intermediate-size 8192 --layers 16 --heads 32 --kv-heads 8 "
    "--vocab-size 128256 --dtype bfloat16"
)
_TINY = _split(
    "--hidden-size 32 --intermediate-size 64 --layers 2 --heads 2 --kv-heads 1 "
    "--vocab-size 64 --samples 16 --length 16 --num-layers 1"
)
_BEST = ("--modifier", '{"preset":"best"}')
_PAPER = ("benchmarks/paper_speed.py", "--output", "{out}")
_TINY_PAPER = (
    *_PAPER,
    *_split("--shape tiny --linearized 2 --engine transformers --repeats 1"),
    *_split("--context 8 --batch 1 --generate-tokens 2"),
)
_VLLM = (*_PAPER, *_split("--engine vllm --generate-tokens 64 --max-seconds 60"))
_TINY_VLLM = (
    *_PAPER,
    *_split("--shape tiny --linearized 2 --engine vllm --repeats 1"),
    *_split("--context 64 --batch 1 --generate-tokens 4"),
)


def _calibration() -> Iterator[Part]:
    table = "Calibration"
    yield Part(
        "covariance",
        table,
        "sums of second moments from bfloat16 and float32, d = 4096 and 8192",
        _split(
            "benchmarks/covariance.py --d 4096,8192 --tokens 131072 --device {device}"
        ),
        _split(
            "benchmarks/covariance.py --d 32 --tokens 128 --rows 64 --device {device}"
        ),
    )
    yield Part(
        "calibration-8b",
        table,
        "over a plain forward pass, Llama-3.1-8B's shape, 256 x 2048 tokens",
        (*_CALIBRATION, *_8B, *_split("--samples 256 --length 2048 --num-layers 12")),
        (*_CALIBRATION, *_TINY),
        needs=_COMPRESSES,
    )
    for name, shape, samples, count in (("1b", _1B, 64, 6), ("8b", _8B, 32, 12)):
        yield Part(
            f"best-{name}",
            table,
            f"preset: best per forward pass, Llama {name.upper()}, {samples} x 512",
            (
                *_CALIBRATION,
                *_BEST,
                *shape,
                *_split(f"--samples {samples} --length 512 --num-layers {count}"),
            ),
            (*_CALIBRATION, *_BEST, *_TINY),
            needs=_COMPRESSES,
        )
    yield Part(
        "processes",
        "Several processes",
        "one process and two with NCCL, 8 layers of d = 4096",
        _split(
            "benchmarks/distributed.py --processes 1,2 --repeats 1 --layers 8 "
            "--hidden-size 4096 --intermediate-size 14336 --heads 32 --kv-heads 8 "
            "--samples 128 --length 2048 --dtype bfloat16"
        ),
        needs=_COMPRESSES,
        gpus=2,
    )


def _solver() -> Iterator[Part]:
    solver = ("benchmarks/solver.py", "--device", "{device}", "--d")
    dry = (*solver, "16", "--repeats", "1")
    for d in (4096, 8192):
        yield Part(
            f"solver-{d}",
            "Solving",
            f"d = {d}, with the reference's algorithm",
            (*solver, str(d), "--repeats", "3"),
            dry,
        )
    # The reference's may take longer than a part may, and ours is to be known anyway.
    yield Part(
        "solver-16384",
        "Solving",
        "d = 16384, ours alone",
        (*solver, "16384", "--repeats", "3", "--alone"),
        (*dry, "--alone"),
    )
    yield Part(
        "solver-16384-reference",
        "Solving",
        "d = 16384, with the reference's algorithm",
        (*solver, "16384", "--repeats", "1"),
    )


def _memory() -> Iterator[Part]:
    memory = _split("benchmarks/memory.py --tokens 524288 --device {device} --d")
    for d in (4096, 8192, 16384):
        yield Part(
            f"memory-{d}",
            "Memory",
            f"d = {d}, each setting",
            (*memory, str(d)),
            (*memory, "32", "--setting", "preset: best"),
        )


def _paper() -> Iterator[Part]:
    for count in _LINEARIZED:
        yield Part(
            f"paper-m{count}",
            "The paper's setting",
            f"Llama-3.1-8B's shape, {count} of 32, 2048 + 2048 tokens, batch 1, eager",
            (*_PAPER, *_split(f"--shape 8b --linearized {count} --repeats 2")),
            _TINY_PAPER,
        )
    for count in _LINEARIZED:
        grid = "--context 1024,2048,4096,8192,16384,32768,65536 --batch 1"
        yield Part(
            f"{FIGURE_4}-m{count}",
            "Figure 4: prefill against context",
            f"Llama-3.1-8B's shape, {count} of 32, transformers, sdpa",
            (
                *_PAPER,
                *_split(f"--shape 8b --linearized {count} --attention sdpa"),
                *_split(f"--engine transformers --generate-tokens 1 {grid}"),
            ),
            (*_TINY_PAPER[:-4], "--batch", "1", "--generate-tokens", "1"),
        )


def _vllm() -> Iterator[Part]:
    table = "In vLLM"
    m12 = _split("--shape 8b --linearized 12")
    for contexts in ("512,2048", "8192", "32768"):
        yield Part(
            f"vllm-{contexts.replace(',', '-')}",
            table,
            f"Llama-3.1-8B's shape, 12 of 32, context {contexts}, batch 1, 8, 64",
            (*_VLLM, *m12, *_split(f"--context {contexts} --batch 1,8,64 --repeats 2")),
            _TINY_VLLM,
            needs=_SERVES,
            in_vllm=True,
        )
    for scheme in ("W4A16", "FP8_DYNAMIC"):
        yield Part(
            f"vllm-{scheme.lower().replace('_', '-')}",
            table,
            f"the same, base and NBL in {scheme}",
            (
                *(*_VLLM, *m12, "--scheme", scheme),
                *_split("--context 2048 --batch 1,8,64 --repeats 2"),
            ),
            (*_TINY_VLLM, "--dtype", "bfloat16", "--scheme", scheme),
            needs=_SERVES,
            in_vllm=True,
        )
    # Published EAGLE-3 heads of this model get about three tokens out of a step.
    drafts = ("--draft-tokens", "4", "--accepted", "3")
    yield Part(
        "vllm-eagle3",
        "Table 5: with EAGLE-3",
        "the same, a random draft of which 3 tokens per step are taken",
        (*_VLLM, *m12, *drafts, *_split("--context 2048 --batch 1,8 --repeats 2")),
        (*_TINY_VLLM, *drafts),
        needs=_SERVES,
        in_vllm=True,
    )


def _model_runner() -> Iterator[Part]:
    table = "docs/versions.md: what only a GPU can show"
    bundled = "examples/models/pycode-4m"
    yield Part(
        "checkpoints",
        table,
        "compressing the bundled model for the rows below",
        _split(f"benchmarks/model_runner.py compress {bundled} {{checkpoints}}"),
        needs=_COMPRESSES,
    )
    for name, what, gpus in (
        ("runners", "V2 and V1: tokens and capacity of eager mode", 1),
        ("graphs-first", "CUDA graph modes, layer 0 replaced", 1),
        ("graphs-last", "CUDA graph modes, the last layer replaced", 1),
        ("graphs-one-left", "CUDA graph modes, all but one layer replaced", 1),
        ("features", "n-gram, chunked prefill with prefix cache, sleep mode", 1),
        ("parallel", "tensor and pipeline parallel", 2),
    ):
        yield Part(
            f"runner-{name}",
            table,
            what,
            _split(
                f"benchmarks/model_runner.py check {name} {{checkpoints}} "
                "--serve-python {serve}"
            ),
            needs=_SERVES,
            gpus=gpus,
        )
    parts = 8
    for number in range(1, parts + 1):
        yield Part(
            f"integration-{number}",
            table,
            f"part {number} of {parts} of the integration tests, schemes, EAGLE-3 and "
            "LoRA among them",
            (
                *_split("-m pytest integration_tests -p no:cacheprovider --part"),
                f"{number}/{parts}",
                *_split("--results {out}"),
            ),
            needs=(*_COMPRESSES, *_SERVES, "pytest"),
        )


def all_parts() -> Sequence[Part]:
    """Return the parts, cheap ones and those of the paper's headline first."""
    makers = (_calibration, _solver, _memory, _paper, _vllm, _model_runner)
    return [part for make in makers for part in make()]


PARTS = all_parts()
