# SPDX-License-Identifier: Apache-2.0
"""Where in a layer things sit, in families that put more than attention there."""

from __future__ import annotations

import pytest
import torch

from tests.calibration.observed import observed
from tests.followers import TinyModels
from tests.streams import recorded
from tests.tiny_llama import token_rows
from tests.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "olmo2"])
def test_what_attention_adds_is_what_the_stream_gains(
    tiny_models: TinyModels, family: str
) -> None:
    """Behind a norm (Gemma 2, OLMo 2), or times a factor (Granite)."""
    found = observed(tiny_models(family))
    layers, index = found.layers, 1
    outputs: list[torch.Tensor] = []
    layers.attention(index).register_forward_hook(
        lambda _module, _args, output: outputs.append(output[0])
    )
    tokens = torch.tensor(token_rows(2, 16)["input_ids"]) % VOCAB_SIZE
    with recorded(found.model, layers.architecture, index) as states:
        found.run([tokens.tolist()])
    before, after = states
    added = layers.added_to_stream(index, outputs[0]).detach().flatten(0, -2).double()
    # a difference of float32 streams
    torch.testing.assert_close(added, after - before, rtol=0, atol=1e-5)


def test_what_attention_reads_is_the_output_of_its_norm(
    tiny_models: TinyModels,
) -> None:
    layers = observed(tiny_models("llama")).layers
    norm = layers.input_norm(0)
    assert norm is not None
    assert norm is layers.modules[0].input_layernorm
    stream = torch.randn(1, 3, norm.get_parameter("weight").numel())
    calls: list[object] = []
    norm.register_forward_hook(lambda *_: calls.append(None))
    assert torch.equal(layers.normalized(0, stream), norm(stream))
    assert len(calls) == 1  # of norm(stream): hooks do not see what is asked for


def test_without_a_norm_in_front_it_reads_the_stream(tiny_models: TinyModels) -> None:
    layers = observed(tiny_models("olmo2")).layers
    assert layers.input_norm(0) is None
    stream = torch.randn(1, 3, 8)
    assert layers.normalized(0, stream) is stream
