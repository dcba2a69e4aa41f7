# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a causal language model on token windows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from nbl_modifier.numerics.logits import positions_at_a_time
from nbl_modifier.numerics.products import FastProducts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A progress bar appears only when an evaluation takes longer than this.
_PROGRESS_DELAY_SECONDS = 5.0


@dataclass(frozen=True)
class PerplexityResult:
    """
    Perplexity per token, and how well the text determines it.

    :param perplexity: ``exp(nll_mean)``, infinite if that overflows
    :param nll_mean: negative log-likelihood per predicted token, in nats
    :param nll_standard_error: standard error of ``nll_mean`` in nats, windows taken as
        independent; NaN for a single window
    :param num_tokens: predicted tokens; the first of a window is not predicted
    :param window_nlls: negative log-likelihood of each window in nats, summed
    :param window_tokens: predicted tokens of each window
    """

    perplexity: float
    nll_mean: float
    nll_standard_error: float
    num_tokens: int
    window_nlls: tuple[float, ...] = field(repr=False)
    window_tokens: tuple[int, ...] = field(repr=False)

    def relative_to(self, baseline: PerplexityResult) -> tuple[float, float]:
        """
        Return this perplexity over the baseline's, and the standard error of the ratio.

        Windows are compared in pairs: what makes a window hard is hard for both models
        and drops out, so the error is far smaller than that of either perplexity.

        :param baseline: another model on the same windows
        :raises ValueError: if the windows differ in number or length
        """
        if self.window_tokens != baseline.window_tokens:
            raise ValueError(
                "relative_to: the two results are over different windows, "
                f"{len(self.window_tokens)} and {len(baseline.window_tokens)} of them. "
                "Evaluate both models on the same windows."
            )
        pairs = zip(self.window_nlls, baseline.window_nlls, strict=True)
        differences = [nll - other for nll, other in pairs]
        paired = summarize(differences, list(self.window_tokens))
        return paired.perplexity, paired.perplexity * paired.nll_standard_error


def perplexity(
    model: PreTrainedModel,
    windows: Sequence[Mapping[str, Any]] | Sequence[Sequence[int]] | torch.Tensor,
    batch_size: int = 8,
) -> PerplexityResult:
    """
    Return the perplexity of ``model`` on ``windows``.

    Sums are kept in float64. Windows may differ in length; those without two tokens are
    left out. For the model see :func:`token_nlls`.

    :param model: causal language model, on any device or offloaded
    :param windows: rows with ``input_ids``, token lists, or ``[num_windows, length]``
    :param batch_size: windows per forward pass
    :raises ValueError: if there is no window, or none with two tokens
    """
    nlls = token_nlls(model, windows, batch_size)
    sums = [nll.double().sum().item() for nll in nlls]
    return summarize(sums, [len(nll) for nll in nlls])


@torch.no_grad()
def token_nlls(
    model: PreTrainedModel,
    windows: Sequence[Mapping[str, Any]] | Sequence[Sequence[int]] | torch.Tensor,
    batch_size: int = 8,
) -> list[torch.Tensor]:
    """
    Return the negative log-likelihood of every token but the first of each window.

    Logits are turned to float32. The model's train or eval mode is left as it was.
    Modules that llm-compressor offloads are used as they are.

    :param model: causal language model, on any device or offloaded
    :param windows: as in :func:`perplexity`; those without two tokens are left out
    :param batch_size: windows per forward pass
    :return: in nats, float32 on the CPU, of each window ``[length - 1]``
    :raises ValueError: if there is no window, or none with two tokens
    """
    from tqdm import tqdm

    rows = [_token_ids(windows[i]) for i in range(len(windows))]
    rows = [row for row in rows if len(row) >= 2]
    if not rows:
        raise ValueError(
            f"perplexity: nothing to predict in {len(windows)} windows. Pass at least "
            "one window of two tokens."
        )
    starts = range(0, len(rows), batch_size)
    nlls: list[torch.Tensor] = []
    with evaluation_mode(model), FastProducts():
        device = _input_device(model)
        bar = tqdm(starts, "perplexity", leave=False, delay=_PROGRESS_DELAY_SECONDS)
        for start in bar:
            nlls += _nlls(model, rows[start : start + batch_size], device)
    return nlls


def _input_device(model: PreTrainedModel) -> torch.device:
    # of an offloaded weight, access gives the copy on the device that computes
    weight: torch.Tensor = model.get_input_embeddings().get_parameter("weight")
    return weight.device


def _token_ids(window: Any) -> torch.Tensor:
    ids = window["input_ids"] if isinstance(window, Mapping) else window
    return torch.as_tensor(ids, dtype=torch.long)


def _nlls(
    model: PreTrainedModel, rows: list[torch.Tensor], device: torch.device
) -> list[torch.Tensor]:
    """
    Return the negative log-likelihoods of each row's tokens in nats, on the CPU.

    :param rows: token ids, each ``[length]``; padded on the right to a common length
    """
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(padded.shape[1])[None, :] < lengths[:, None]
    logits = model(
        input_ids=padded.to(device),
        attention_mask=mask.long().to(device),
        use_cache=False,
    ).logits  # [rows, length, vocabulary]
    nlls = []
    for row, row_logits in zip(rows, logits, strict=True):
        size = positions_at_a_time(row_logits.shape[-1])
        parts = zip(
            row_logits[: len(row) - 1].split(size),
            row[1:].to(row_logits.device).split(size),
            strict=True,
        )
        nlls.append(torch.cat([_nll(*part) for part in parts]).cpu())
    return nlls


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float(), targets, reduction="none")


def summarize(nll_sums: list[float], counts: list[int]) -> PerplexityResult:
    """
    Return the perplexity over windows, and the standard error of a ratio of sums.

    :param nll_sums: negative log-likelihood of each window in nats, summed
    :param counts: predicted tokens of each window, at least one in all
    """
    num_tokens = sum(counts)
    mean = math.fsum(nll_sums) / num_tokens
    squares = math.fsum(
        (nll - mean * count) ** 2 for nll, count in zip(nll_sums, counts, strict=True)
    )
    n = len(counts)
    error = math.sqrt(squares * n / (n - 1)) / num_tokens if n > 1 else math.nan
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    return PerplexityResult(
        value, mean, error, num_tokens, tuple(nll_sums), tuple(counts)
    )


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """
    Switch to eval mode and give every module its own mode back.

    :param model: any module
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
