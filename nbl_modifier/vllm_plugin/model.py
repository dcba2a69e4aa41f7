"""
vLLM's models with linear layers in place of some attention layers or whole blocks.

No model code is copied. Each class is vLLM's own plus :class:`LinearizedMixin`, made
when its name is first asked for, so that only the family being served is imported.
vLLM caches what it learns about these classes under a hash of this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import PPMissingLayer, maybe_prefix

from nbl_modifier.architectures import ARCHITECTURES, Architecture
from nbl_modifier.hf.loading_nbl import check_tensors

from .exchange import (
    left_out,
    let_go_of_experts,
    replace_in_transformers,
    replace_layer,
    stock_class,
)
from .layers import make_map
from .stages import check_stages

__all__ = ["LinearizedMixin"]

# Where vLLM keeps the classes that run transformers' models with its own layers.
_TRANSFORMERS_BACKEND = "vllm.model_executor.models.transformers"

# Below "vllm", the only logger that vLLM gives a handler.
logger = init_logger(f"vllm.{__name__}")


class LinearizedMixin:
    """
    Turns a causal language model of vLLM into its linearized counterpart.

    The stock class builds the model, less each attention to be linear, which is taken
    out as soon as it exists: a model that fits a GPU only without them can be built.
    Linear layers are put in their places before any weight is read; loading, LoRA,
    speculative decoding and parallelism are inherited.
    """

    #: The row, with the path of the layers that vLLM's class has.
    architecture: ClassVar[Architecture]
    #: Whether vLLM has no code of its own and runs transformers' with its own layers.
    in_transformers: ClassVar[bool] = False

    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any
    ) -> None:
        """
        Build the model, with weights yet to be loaded.

        :param vllm_config: its ``hf_config`` names the linearized layers
        :param prefix: name of this module in the engine, empty for the main model
        :param kwargs: passed on to the stock class
        :raises ValueError: if ``nbl_config`` is invalid, or a pipeline stage is left
            without any attention layer
        """
        config = vllm_config.model_config.hf_config
        text_config = config.get_text_config()
        linearized = config.linearized_layers()
        check_stages(linearized, vllm_config)
        architecture = self.architecture
        names = {
            index: maybe_prefix(prefix, architecture.attention_name(index))
            for index in linearized
        }
        with (
            stock_class(config) if self.in_transformers else contextlib.nullcontext(),
            left_out(architecture.attention, set(names.values()), vllm_config),
        ):
            # The stock class is next in the order of resolution.
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]

        layers: nn.ModuleList = self.get_submodule(architecture.layers)  # type: ignore[attr-defined]
        for index, spec in linearized.items():
            if isinstance(layers[index], PPMissingLayer):  # on another pipeline stage
                continue
            name = architecture.layer_name(index)
            if spec.kind == "attention":
                name = architecture.attention_name(index)
            linear = None
            if spec.method == "linear":
                linear = make_map(
                    text_config.hidden_size,
                    spec,
                    vllm_config.quant_config,
                    maybe_prefix(prefix, f"{name}.linear"),
                    return_bias=not self.in_transformers,
                )
            exchange = (
                replace_in_transformers if self.in_transformers else replace_layer
            )
            exchange(layers, architecture, index, spec, linear, vllm_config)
        let_go_of_experts(self)  # type: ignore[arg-type]
        self._linearized = linearized
        self._checkpoint = vllm_config.model_config.model
        logger.info_once(
            "%s: %d of %d layers have no attention and no KV cache: %s",
            type(self).__name__,
            len(linearized),
            text_config.num_hidden_layers,
            ", ".join(map(str, linearized)) or "none",
            scope="global",
        )

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> set[str] | None:
        """
        Load what a checkpoint holds, as the stock class does.

        vLLM does not miss the tensors of linear layers that are not quantized (0.32,
        model_loader/default_loader.py, ``track_weights_loading``), and would serve
        whatever their memory held.

        :param weights: names and tensors: all, or, as in training, some
        :return: names of the parameters that were loaded
        :raises ValueError: for a tensor too many in a replaced layer, or, when every
            other layer got its weights, one too few
        """
        loaded: set[str] | None = super().load_weights(self._checked(weights))  # type: ignore[misc]
        layers: nn.ModuleList = self.get_submodule(self.architecture.layers)  # type: ignore[attr-defined]
        untouched = set[int]()
        maps: dict[int, set[str]] = {}
        for index, layer in enumerate(layers):
            prefix = f"{self.architecture.layers}.{index}."
            names = {prefix + name for name, _ in layer.named_parameters()}
            if index in self._linearized:
                maps[index] = {name for name in names if _must_be_loaded(name)}
                names -= maps[index]
            if names and loaded is not None and names.isdisjoint(loaded):
                untouched.add(index)
        if loaded is None or untouched:  # weights of a few layers, to be exchanged
            return loaded
        for index, needed in maps.items():
            check_tensors(
                f"{self.architecture.layers}.{index}.",
                self.architecture,
                self._linearized[index],
                missing=needed - loaded,
                found=[],
                checkpoint=self._checkpoint,
            )
        return loaded

    def _checked(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Hand on the tensors of a checkpoint; refuse those of what was replaced."""
        stock = ARCHITECTURES[self.architecture.model_type]
        paths = {self.architecture.layers, stock.layers}
        replaced = {
            f"{path}.{index}.": spec
            for path in paths
            for index, spec in self._linearized.items()
        }
        for name, tensor in weights:
            for layer, spec in replaced.items():
                if name.startswith(layer):
                    check_tensors(
                        layer,
                        stock,
                        spec,
                        missing=[],
                        found=[name],
                        checkpoint=self._checkpoint,
                    )
            yield name, tensor


def _must_be_loaded(name: str) -> bool:
    """Return whether a parameter of a replaced layer comes from the checkpoint."""
    path, _, last = name.rpartition(".")
    # The rest are scales, which depend on the quantization, and is the stock layer's.
    return "linear" in path.split(".") and last in ("weight", "weight_packed", "bias")


def _make_class(architecture: Architecture) -> type[nn.Module]:
    # vLLM's table knows the file of each model; importing it is left to vLLM.
    base = ModelRegistry.models[architecture.causal_lm].load_model_cls()
    return type(
        architecture.nbl_causal_lm,
        (LinearizedMixin, base),
        {
            "architecture": dataclasses.replace(
                architecture,
                layers=architecture.vllm_layers or architecture.layers,
                attention=architecture.vllm_attention or architecture.attention,
            ),
            "in_transformers": base.__module__.startswith(_TRANSFORMERS_BACKEND),
            "__module__": __name__,
            "__doc__": f"``{base.__name__}`` with linearized layers.",
        },
    )


def __getattr__(name: str) -> type[nn.Module]:
    # Classes are made on first use, and found again by pickle and vLLM's subprocesses.
    for architecture in ARCHITECTURES.values():
        if architecture.nbl_causal_lm == name:
            globals()[name] = made = _make_class(architecture)
            return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
