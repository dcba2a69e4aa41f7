# SPDX-License-Identifier: Apache-2.0
"""Running a model in parts: together they are the whole, and leave no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import set_onload_device
from torch import Tensor

from nbl_modifier.architectures import architecture_of
from nbl_modifier.calibration.forward import PartialForward, calling, recomputes
from tests.followers import TinyModels
from tests.tiny_llama import Model, load, load_on_disk

pytestmark = pytest.mark.usefixtures("one_thread")

# sliding windows, norms behind attention, scaled and soft-capped logits
FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "olmo2", "granite", "cohere"]


def batch_of(num_rows: int = 2, length: int = 24) -> dict[str, Tensor]:
    """Return random tokens, one row of which is padded on the left."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 128, (num_rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def partial(model: Model) -> PartialForward:
    return PartialForward(model, architecture_of(model.config.model_type))


def test_a_graph_does_not_hold_a_model_that_is_on_disk(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight is read for each use, and backward needs it again: all of them."""
    model = load(llama)
    weights = sum(weight.nbytes for weight in model.model.layers.parameters())
    # more than what layers make of a token, less than their weights
    monkeypatch.setattr("nbl_modifier.calibration.forward._KEPT_BYTES", weights // 2)
    assert not recomputes(model, tokens=1)
    # what calibration does to any model on a CPU: it computes where it is kept
    set_onload_device(model, torch.device("cpu"))
    assert not recomputes(model, tokens=1)
    assert recomputes(load_on_disk(llama, tmp_path), tokens=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_make_up_the_whole(tiny_models: TinyModels, family: str) -> None:
    model, batch = load(tiny_models(family)), batch_of()
    with torch.no_grad():
        whole = model(**batch, use_cache=False).logits
    forward = partial(model)
    assert torch.equal(forward.logits(batch), whole)
    stream: Tensor | None = None
    for index in range(len(forward.layers)):
        stream = forward.hidden_states(batch, index, stream, max(index - 1, 0))
        assert torch.equal(forward.logits(batch, stream, index), whole), index
    assert stream is not None
    in_one_go = forward.hidden_states(batch, len(forward.layers) - 1)
    assert in_one_go is not None
    assert torch.equal(in_one_go, stream)
    for name, module in model.named_modules():
        assert "forward" not in vars(module), name
        assert not module._forward_hooks, name


def test_only_the_wanted_layers_run(tiny_models: TinyModels) -> None:
    model = load(tiny_models("llama"))
    ran: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    forward, batch = partial(model), batch_of()
    stream = forward.hidden_states(batch, 1)
    assert ran == [0]
    assert stream is not None
    assert forward.hidden_states(batch, 3, stream, 1) is not None
    assert ran == [0, 1, 2]
    forward.logits(batch, stream, 3)
    assert ran == [0, 1, 2, 3]


def test_failure_leaves_no_trace(tiny_models: TinyModels) -> None:
    model = load(tiny_models("llama"))
    forward, batch = partial(model), batch_of()
    expected = forward.logits(batch)
    stream = torch.zeros(3, 24, 32)  # of another number of rows
    with pytest.raises(RuntimeError):
        forward.logits(batch, stream, 2)
    with pytest.raises(RuntimeError):
        forward.hidden_states(batch, 3, stream, 2)
    assert torch.equal(forward.logits(batch), expected)
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks


def test_head_computes_although_it_is_disabled(tiny_models: TinyModels) -> None:
    from llmcompressor.utils.helpers import calibration_forward_context

    model = load(tiny_models("llama"))
    forward, batch = partial(model), batch_of()
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
    counts = batch["attention_mask"].bool()  # what padding attends to is anything
    with calibration_forward_context(model):
        # eager attention there, SDPA outside: float32 rounding
        logits = forward.logits(batch)
        assert torch.allclose(logits[counts], expected[counts], atol=1e-4)
        assert model(**batch).logits.device.type == "meta"


def test_streams_need_no_head(tiny_models: TinyModels) -> None:
    """Also where llm-compressor has not disabled it."""
    model = load(tiny_models("llama"))
    ran: list[int] = []
    head = model.get_output_embeddings().forward

    def counted(hidden: Tensor) -> Tensor:
        ran.append(1)
        return head(hidden)

    with calling(model.get_output_embeddings(), counted):
        stream = partial(model).hidden_states(batch_of(), 2)
        assert not ran
        partial(model).logits(batch_of(), stream, 2)
    assert stream is not None
    assert stream.shape[-1] == model.config.hidden_size


def test_labels_are_no_input(tiny_models: TinyModels) -> None:
    from llmcompressor.utils.helpers import calibration_forward_context

    model = load(tiny_models("llama"))
    forward, batch = partial(model), batch_of()
    labelled = batch | {"labels": batch["input_ids"], "loss_mask": batch["input_ids"]}
    with calibration_forward_context(model):  # a loss would need the logits
        stream = forward.hidden_states(labelled, 2)
        plain = forward.hidden_states(batch, 2)
    assert stream is not None
    assert plain is not None
    assert torch.equal(stream, plain)
