"""What transformers makes of a checkpoint, one prompt at a time."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from integration_tests.materials import load_model, max_tokens, prompts


@dataclass(frozen=True)
class Reference:
    """
    Greedy continuations, past any end of text, and log-probabilities of the prompts.

    :param tokens: generated ids, one list per prompt
    :param margins: how far each was ahead of the next best, nat, same shape
    :param token_logprobs: of these, nat, same shape
    :param logprobs: of each prompt token but the first, all prompts in one row, nat
        ``[num_tokens]``
    """

    tokens: list[list[int]]
    margins: list[list[float]]
    token_logprobs: list[list[float]]
    logprobs: torch.Tensor


@cache
def reference(directory: Path, dtype: str, model: str) -> Reference:
    """
    Return transformers' answers to the prompts.

    :param directory: checkpoint
    :param dtype: name of a torch dtype
    :param model: see :class:`Row`
    """
    loaded = load_model(directory, getattr(torch, dtype))
    answers = [generate(loaded, prompt, max_tokens(model)) for prompt in prompts(model)]
    return Reference(
        tokens=[answer.tokens for answer in answers],
        margins=[answer.margins for answer in answers],
        token_logprobs=[answer.logprobs for answer in answers],
        logprobs=prompt_logprobs(directory, dtype, model),
    )


@cache
def prompt_logprobs(
    directory: Path, dtype: str, model: str, in_float32: bool = False
) -> torch.Tensor:
    """
    Return the prompts' log-probabilities in transformers, as in :class:`Reference`.

    :param directory: checkpoint
    :param dtype: name of a torch dtype
    :param model: see :class:`Row`
    :param in_float32: compute in float32 with the weights as ``dtype`` has them
    """
    loaded = load_model(directory, getattr(torch, dtype))
    if in_float32:
        loaded = loaded.float()
    return torch.cat([logprobs(loaded, prompt) for prompt in prompts(model)])


class Continuation(NamedTuple):
    """What follows one prompt, as in :class:`Reference`."""

    tokens: list[int]
    margins: list[float]
    logprobs: list[float]


@torch.no_grad()
def generate(
    model: Any, prompt: list[int], num_tokens: int, **kwargs: Any
) -> Continuation:
    """
    Return a greedy continuation.

    :param kwargs: of ``model.generate``
    """
    model.generation_config.eos_token_id = None
    output = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=num_tokens,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    best = torch.cat(output.logits).float().log_softmax(-1).topk(2).values
    return Continuation(
        tokens=output.sequences[0, len(prompt) :].tolist(),
        margins=(best[:, 0] - best[:, 1]).tolist(),
        logprobs=best[:, 0].tolist(),
    )


@torch.no_grad()
def logprobs(model: Any, prompt: list[int]) -> torch.Tensor:
    """
    Return the log-probability of each token but the first.

    :return: float32 ``[num_tokens - 1]``
    """
    input_ids = torch.tensor([prompt])
    logits = model(input_ids).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, input_ids[0, 1:, None])[:, 0]
