# SPDX-License-Identifier: Apache-2.0
"""Prompts of different rounds have nothing in common."""

from nbl_modifier.benchmark.timing import random_prompts


def test_prompts_are_token_ids_of_the_vocabulary() -> None:
    prompts = random_prompts(50, batch=3, context=200, seed=1)
    assert [len(prompt) for prompt in prompts] == [200] * 3
    ids = {token for prompt in prompts for token in prompt}
    assert min(ids) == 0
    assert max(ids) == 49


def test_the_seed_decides_them() -> None:
    """The same for both models; in each round others from the first tokens on."""
    first = random_prompts(10_000, 2, 16, seed=1)
    assert random_prompts(10_000, 2, 16, seed=1) == first
    other = random_prompts(10_000, 2, 16, seed=2)
    assert not {tuple(p[:4]) for p in first} & {tuple(p[:4]) for p in other}
