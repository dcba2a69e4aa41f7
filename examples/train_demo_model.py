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
import json
import math
import os
import random
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from nbl_modifier.evaluation import PerplexityResult, perplexity
from nbl_modifier.evaluation.texts import STDLIB, load_texts, pack

# Shorter files say nothing, longer ones are generated tables.
MIN_CHARACTERS, MAX_CHARACTERS = 400, 60_000
PACKAGE_FOLDERS = ("site-packages", "dist-packages")
BOS, EOS = "<s>", "</s>"
# AdamW as in the Llama papers; the rate is high because the model is small.
BETAS, WEIGHT_DECAY, MAX_GRADIENT_NORM = (0.9, 0.95), 0.1, 1.0
WARMUP, FINAL_RATE = 0.02, 0.1  # of the run; of the peak rate
HELDOUT_WINDOWS = 64
SECONDS_BETWEEN_SAVES, STEPS_BETWEEN_LOSSES = 300.0, 20
# What decides which numbers a run computes: equal for a run to be continued.
IDENTITY = (
    *("model_type", "layers", "hidden", "heads", "kv_heads", "head_dim", "mlp"),
    *("vocabulary", "positions", "tokens", "batch_size", "seq_length", "lr", "seed"),
    *("bf16", "compile"),
)


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


# --- text -------------------------------------------------------------------------


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


def save_atomically(content: Any, path: Path) -> None:
    """Write a file so that a crash leaves the previous one or this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    torch.save(content, new)
    new.replace(path)


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


# --- training ---------------------------------------------------------------------


class Ranks:
    """
    The processes that share each batch: those of torchrun, or this one alone.

    :param device: what they compute on
    """

    def __init__(self, device: str) -> None:
        self.is_distributed = "RANK" in os.environ
        if self.is_distributed:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        self.rank = dist.get_rank() if self.is_distributed else 0
        self.size = dist.get_world_size() if self.is_distributed else 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replace the gradients by their mean over all processes."""
        if not self.is_distributed:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, flat.split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))

    def of_first(self, value: float, device: str) -> float:
        """Return the first process's value, so that all decide alike."""
        if not self.is_distributed:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(tensor, 0)
        return float(tensor.item())

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.is_distributed:
            dist.barrier()

    def close(self) -> None:
        """Wait for the others and leave."""
        self.wait()
        if self.is_distributed:
            dist.destroy_process_group()


class Run:
    """
    One training run, which can be interrupted after any step.

    :param args: the command line
    :param windows: ``[num_windows, seq_length]``
    :param ranks: the processes that share it
    :param folder: for what an interrupted run needs to continue
    """

    def __init__(
        self,
        args: argparse.Namespace,
        windows: torch.Tensor,
        ranks: Ranks,
        folder: Path,
    ) -> None:
        self.args, self.windows = args, windows
        self.ranks, self.folder = ranks, folder
        torch.manual_seed(args.seed)
        self.model = new_model(args).to(args.device)
        self.forward = torch.compile(self.model) if args.compile else self.model
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, args.lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.step, self.seconds = 0, 0.0
        self.orders: dict[int, torch.Tensor] = {}
        self.steps = max(1, round(args.tokens / (args.batch_size * args.seq_length)))
        count = sum(p.numel() for p in self.model.parameters())
        if ranks.is_first:
            what = f"{args.model_type}, {count / 1e6:.2f} M parameters"
            print(f"{what}, {self.steps} steps", flush=True)

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for a run to be continued."""
        return {name: getattr(self.args, name) for name in IDENTITY}

    def resume(self) -> None:
        """Continue where an interrupted run of the same command stopped, if any."""
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True, map_location=self.args.device)
        differing = [k for k, v in self.identity().items() if state["identity"][k] != v]
        if differing:
            raise SystemExit(
                f"{path} belongs to a run with other {', '.join(differing)}. Continue "
                f"that one, or remove {self.folder}."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        print(f"continues at step {self.step}", flush=True)

    def store(self) -> None:
        """Write what is needed to continue from here."""
        state = {
            "identity": self.identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        save_atomically(state, self.folder / "state.pt")

    def fraction(self) -> float:
        """Return how much of the budget is spent, of tokens or of minutes."""
        in_time = self.seconds / (60 * self.args.minutes)
        return max(self.step / self.steps, in_time)

    def train(self) -> None:
        """Train until the budget is spent."""
        first = self.ranks.is_first
        bar = tqdm(total=self.steps, initial=self.step, desc="train", disable=not first)
        self.model.train()
        last = saved = time.monotonic()
        try:
            while self.fraction() < 1:
                loss = self.train_step()
                now = time.monotonic()
                self.step += 1
                elapsed = self.seconds + now - last
                self.seconds = self.ranks.of_first(elapsed, self.args.device)
                last = now
                bar.update()
                if self.step % STEPS_BETWEEN_LOSSES == 0:
                    self.show(loss.item(), bar)
                if first and now - saved > SECONDS_BETWEEN_SAVES:
                    self.store()
                    saved = now
        except KeyboardInterrupt:
            if first:
                self.store()
            raise SystemExit("\nstopped; the same command continues.") from None
        bar.close()
        if first:
            self.store()

    def show(self, loss: float, bar: tqdm[Any]) -> None:
        """Show the loss, and stop where it makes no sense to go on."""
        bar.set_postfix(loss=f"{loss:.3f}")
        if not math.isfinite(loss):
            raise SystemExit(f"step {self.step}: the loss is {loss}. Lower --lr.")

    def train_step(self) -> torch.Tensor:
        """Take one step and return its loss in nats per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * schedule(self.fraction())
        batch = self.batch().to(self.args.device)
        device_type = torch.device(self.args.device).type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.args.bf16):
            logits = self.forward(input_ids=batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()
        )
        loss.backward()
        self.ranks.average_gradients(list(self.model.parameters()))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def batch(self) -> torch.Tensor:
        """
        Return this process's windows of this step: each once before any comes again.
        """
        size = self.args.batch_size
        epoch, index = divmod(self.step, len(self.windows) // size)
        if epoch not in self.orders:
            generator = torch.Generator().manual_seed(
                self.args.seed * 1_000_003 + epoch
            )
            self.orders = {
                epoch: torch.randperm(len(self.windows), generator=generator)
            }
        rows = self.orders[epoch][index * size : (index + 1) * size]
        return self.windows[rows[self.ranks.rank :: self.ranks.size]].long()

    def save(self, tokenizer: Any) -> None:
        """Write the model in bfloat16, its held-out perplexity and how it was made."""
        args, part = self.args, self.folder / "model"
        self.model.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
        result = heldout_perplexity(part, tokenizer, args.seq_length)
        record = {
            "command": " ".join(["python", *sys.argv]),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tokens": self.step * args.batch_size * args.seq_length,
            "minutes": round(self.seconds / 60, 1),
            "perplexity": result.perplexity,
            "perplexity_tokens": result.num_tokens,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
        }
        text = json.dumps(record, indent=2) + "\n"
        (part / "training.json").write_text(text)
        if args.output.exists():
            shutil.rmtree(args.output)
        part.rename(args.output)
        shutil.rmtree(self.folder)
        print(text, end="")


def new_model(args: argparse.Namespace) -> Any:
    """Return a model with random weights, float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        args.model_type,
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.positions,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def schedule(fraction: float) -> float:
    """Return the learning rate over its peak: a line up, then half a cosine down."""
    if fraction < WARMUP:
        return max(fraction / WARMUP, 0.01)
    cosine = math.cos(math.pi * min(1.0, (fraction - WARMUP) / (1 - WARMUP)))
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + cosine) / 2


def heldout_perplexity(
    directory: Path, tokenizer: Any, seq_length: int
) -> PerplexityResult:
    """Return the saved model's perplexity on the standard library's first windows."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    texts = load_texts(STDLIB, "heldout")
    return perplexity(model, pack(texts, tokenizer, seq_length, HELDOUT_WINDOWS))


if __name__ == "__main__":
    sys.exit(main())
