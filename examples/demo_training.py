# SPDX-License-Identifier: Apache-2.0
"""The training run of train_demo_model.py: its processes, its steps, what it keeps."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from nbl_modifier.evaluation import PerplexityResult, perplexity
from nbl_modifier.evaluation.texts import STDLIB, load_texts
from nbl_modifier.evaluation.token_windows import pack

__all__ = ["Ranks", "Run", "save_atomically"]

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


def save_atomically(content: Any, path: Path) -> None:
    """Write a file so that a crash leaves the previous one or this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    torch.save(content, new)
    new.replace(path)
