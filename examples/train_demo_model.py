# SPDX-License-Identifier: Apache-2.0
"""
Train a small model on the Python source installed on this machine.

The models in `examples/models/` were made with it; each README there has its command::

    python examples/train_demo_model.py --output my_model --model-type qwen3 \
        --source .venv --tokens 20e6 --minutes 60

Text is the Python files below each `--source`, or in the running environment's
site-packages, without copies and without the standard library, which stays held out:
the perplexity printed at the end is measured on it. The same files and arguments give
the same model, and an interrupted run that is started again continues. A run that
`--minutes` ends depends on the speed of the machine as well.

On a GPU, add `--device cuda --bf16 --compile`. `torchrun --nproc-per-node N` in place
of `python` splits each batch over N processes, on CPUs or GPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from demo_training import Ranks, Run, save_atomically
from tqdm import tqdm

# Shorter files say nothing, longer ones are generated tables.
MIN_CHARACTERS, MAX_CHARACTERS = 400, 60_000
PACKAGE_FOLDERS = ("site-packages", "dist-packages")
BOS, EOS = "<s>", "</s>"


def main() -> int:
    """Train, save and measure."""
    args = arguments()
    torch.set_num_threads(args.threads)
    ranks = Ranks(args.device)
    if ranks.is_distributed and args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    if args.batch_size % ranks.size:
        raise SystemExit(
            f"--batch-size {args.batch_size} is not a multiple of {ranks.size}, the "
            "number of processes. Pass one that is."
        )
    if args.output.exists() and not args.overwrite:
        raise SystemExit(
            f"{args.output} exists. Pass --overwrite, or another --output."
        )
    folder = args.output.with_name(args.output.name + ".training")
    windows, tokenizer = stored_text(args, folder, ranks)
    args.vocabulary = len(tokenizer)
    run = Run(args, windows, ranks, folder)
    run.resume()
    run.train()
    if ranks.is_first:
        run.save(tokenizer)
    ranks.close()
    return 0


def arguments() -> argparse.Namespace:
    """Return the command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the finished model")
    add("--overwrite", action="store_true", help="replace a finished model")
    add("--source", type=Path, action="append", help="folder of Python files")
    add("--tokenizer", type=Path, help="reuse one instead of training one")
    add(
        "--model-type", default="llama", help="llama, qwen3, mistral … (default: llama)"
    )
    add("--layers", type=int, default=16)
    add("--hidden", type=int, default=128)
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, default=2)
    add("--head-dim", type=int, default=32)
    add("--mlp", type=int, default=384)
    add("--vocabulary", type=int, default=4096)
    add("--positions", type=int, default=2048)
    add("--tokens", type=float, default=20e6, help="to train on, such as 20e6")
    add("--minutes", type=float, default=math.inf, help="stop then, if not done before")
    add("--batch-size", type=int, default=16, help="windows per step")
    add("--seq-length", type=int, default=256, help="tokens per window")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="cpu, cuda …")
    add("--bf16", action="store_true", help="compute in bfloat16; weights stay float32")
    add("--compile", action="store_true", help="torch.compile")
    args = parser.parse_args()
    if args.hidden < 1 or args.layers < 1 or args.heads % args.kv_heads:
        parser.error("--hidden and --layers are positive, --kv-heads divides --heads")
    return args


def stored_text(
    args: argparse.Namespace, folder: Path, ranks: Ranks
) -> tuple[torch.Tensor, Any]:
    """
    Return token windows and tokenizer, those of the interrupted run if there was one.

    Packages may have been installed since.

    :param folder: of the unfinished run
    """
    from transformers import AutoTokenizer

    path = folder / "windows.pt"
    if ranks.is_first and not path.exists():
        packages = [Path(p) for p in sys.path if Path(p).name in PACKAGE_FOLDERS]
        texts = documents(args.source or packages)
        random.Random(args.seed).shuffle(texts)
        characters = sum(map(len, texts))
        print(f"{len(texts)} files, {characters / 1e6:.1f} M characters", flush=True)
        tokenizer = load_or_train_tokenizer(args, texts)
        windows = token_windows(args, texts, tokenizer)
        tokenizer.save_pretrained(folder / "tokenizer")
        save_atomically(windows, path)
        print(f"{windows.numel() / 1e6:.2f} M different tokens", flush=True)
    ranks.wait()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for key in ("is_local", "local_files_only"):  # true of this copy only
        tokenizer.init_kwargs.pop(key, None)
    return torch.load(path, weights_only=True), tokenizer


def documents(sources: list[Path]) -> list[str]:
    """
    Return Python files, each content once, in order of its hash.

    :param sources: folders
    :raises SystemExit: if a folder is missing or there is no file
    """
    for source in sources:
        if not source.is_dir():
            raise SystemExit(f"--source {source}: no such folder.")
    seen = {digest(text) for text in read(Path(sysconfig.get_paths()["stdlib"]), True)}
    found = {}
    for folder in sources:
        for text in read(folder, False):
            key = digest(text)
            if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS and key not in seen:
                found[key] = text
    if not found:
        raise SystemExit(f"no Python files in {sources}. Pass another --source.")
    # by content, not by path: where packages are installed does not matter
    return [found[key] for key in sorted(found)]


def digest(text: str) -> str:
    """Return a hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def read(folder: Path, stdlib: bool) -> Iterator[str]:
    """Yield Python files below a folder: the standard library's, or all others."""
    for path in folder.rglob("*.py"):
        if is_stdlib(path) != stdlib or not path.is_file():
            continue
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # written in another encoding, or a test of one


def is_stdlib(path: Path) -> bool:
    """Return True for lib/pythonX.Y/ of any Python, except packages installed there."""
    match = re.search(r"/lib(?:64)?/python\d[\d.]*/([^/]+)", path.resolve().as_posix())
    return match is not None and match.group(1) not in PACKAGE_FOLDERS


def load_or_train_tokenizer(args: argparse.Namespace, texts: list[str]) -> Any:
    """Return the tokenizer of another model, or a byte-level BPE of these texts."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if args.tokenizer is not None:
        return AutoTokenizer.from_pretrained(args.tokenizer)
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, args.vocabulary, special_tokens=[BOS, EOS], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=BOS, eos_token=EOS
    )


def token_windows(
    args: argparse.Namespace, texts: list[str], tokenizer: Any
) -> torch.Tensor:
    """
    Return as many tokens as the run needs, or all there are.

    :return: ``[num_windows, seq_length]``, int32; every document starts with BOS
    """
    pieces, count = [], 0
    bar = tqdm(total=int(args.tokens), desc="tokenize", unit="token", unit_scale=True)
    for start in range(0, len(texts), 100):
        if count >= args.tokens:
            break
        batch = tokenizer(texts[start : start + 100], verbose=False)["input_ids"]
        for ids in batch:
            pieces.append(
                torch.tensor([tokenizer.bos_token_id, *ids], dtype=torch.int32)
            )
            count += len(pieces[-1])
            bar.update(len(pieces[-1]))
    bar.close()
    stream = torch.cat(pieces)
    size = args.batch_size * args.seq_length
    if len(stream) < size:
        raise SystemExit(
            f"{len(stream)} tokens, not one batch of {size}. Add --source."
        )
    return stream[: len(stream) // args.seq_length * args.seq_length].view(
        -1, args.seq_length
    )


if __name__ == "__main__":
    sys.exit(main())
