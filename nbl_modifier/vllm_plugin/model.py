"""
vLLM's models with linear layers in place of some attention layers or whole blocks.

No model code is copied. Each class is vLLM's own plus :class:`LinearizedMixin`, made
when its name is first asked for, so that only the family being served is imported.
vLLM caches what it learns about these classes under a hash of this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence, Set
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import PPMissingLayer, maybe_prefix

from nbl_modifier.architectures import ARCHITECTURES, Architecture
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.hf.loading_nbl import check_tensors
from nbl_modifier.hf.modeling_nbl import linearize_layer

__all__ = [
    "DroppedAttention",
    "LinearizedAttention",
    "LinearizedBlock",
    "LinearizedMixin",
    "LowRankLinear",
    "ResidualAdd",
]

# Where vLLM keeps the classes that run transformers' models with its own layers.
_TRANSFORMERS_BACKEND = "vllm.model_executor.models.transformers"

# Below "vllm", the only logger that vLLM gives a handler.
logger = init_logger(f"vllm.{__name__}")

# Output features per process that vLLM's kernels for 4-bit weights can work on: a
# multiple of 64 on GPUs (Marlin), of 32 on CPUs.
_MIN_SPLIT = 64


class LowRankLinear(nn.Module):
    """
    Affine map of low rank, as two linear layers.

    In tensor parallel both are split over their output features, so that groups of a
    quantized input dimension stay whole in each of them, whatever the rank. Where too
    little of the rank would be left to each process, all hold all of the first layer.

    :param hidden_size: width of the residual stream
    :param rank: features between the two layers
    :param quant_config: the checkpoint's quantization, or None
    :param prefix: name of this module
    :param return_bias: whether to return None besides, as vLLM's linear layers do
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        return_bias: bool = True,
    ) -> None:
        super().__init__()
        self.return_bias = return_bias
        options = {"quant_config": quant_config, "prefix": f"{prefix}.reduce"}
        if rank % (_MIN_SPLIT * get_tensor_model_parallel_world_size()) == 0:
            self.reduce = ColumnParallelLinear(
                hidden_size, rank, bias=False, gather_output=True, **options
            )
        else:
            self.reduce = ReplicatedLinear(hidden_size, rank, bias=False, **options)
        self.expand = ColumnParallelLinear(
            rank,
            hidden_size,
            bias=True,
            gather_output=True,
            quant_config=quant_config,
            prefix=f"{prefix}.expand",
        )

    def forward(
        self, hidden_states: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, None]:
        """
        Return the map of every token.

        :param hidden_states: ``[num_tokens, hidden_size]``
        :return: ``[num_tokens, hidden_size]``, and None if ``return_bias``
        """
        reduced, _bias = self.reduce(hidden_states)
        output, _bias = self.expand(reduced)
        return (output, None) if self.return_bias else output


def _make_map(
    hidden_size: int,
    spec: LinearizedLayer,
    quant_config: QuantizationConfig | None,
    prefix: str,
    return_bias: bool = True,
) -> nn.Module:
    """
    Return the linear map of a layer, split over its output features in tensor parallel.

    Each rank holds 1/TP of the weight, and groups of a quantized input dimension stay
    whole.
    """
    if spec.rank is not None:
        return LowRankLinear(hidden_size, spec.rank, quant_config, prefix, return_bias)
    # Exactly this class: LoRA does not recognize subclasses of it.
    return ColumnParallelLinear(
        hidden_size,
        hidden_size,
        bias=True,
        gather_output=True,
        quant_config=quant_config,
        prefix=prefix,
        return_bias=return_bias,
    )


def _streams(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Return hidden states and residual stream that a module of vLLM was called with.

    By name, or else in this order; positions, which may stand in front or behind, are
    integers.
    """
    given = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
    named = [kwargs.get(name) for name in ("hidden_states", "residual")]
    hidden_states = given.pop(0) if named[0] is None else named[0]
    residual = given.pop(0) if given and named[1] is None else named[1]
    return hidden_states, residual


class LinearizedAttention(nn.Module):
    """
    Affine map in place of an attention layer, without a KV cache.

    :param linear: the map
    :param num_summands: how many processes' outputs the decoder layer adds up: in a
        parallel block attention and MLP leave that to the layer, which does it once
    """

    def __init__(self, linear: nn.Module, num_summands: int = 1) -> None:
        super().__init__()
        self.linear = linear
        self.num_summands = num_summands

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Return the map of every token, or this process's equal share of it.

        :param args: as vLLM's attention modules are called, in the family's order;
            among them the hidden states ``[num_tokens, hidden_size]``
        :param kwargs: the same by name
        :return: ``[num_tokens, hidden_size]``
        """
        hidden_states, _ = _streams(args, kwargs)
        output, _bias = self.linear(hidden_states)
        return output if self.num_summands == 1 else output / self.num_summands


class DroppedAttention(nn.Module):
    """Nothing in place of an attention layer: it adds zero to the residual stream."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Return zero for every token.

        :param args: as :meth:`LinearizedAttention.forward`
        :param kwargs: the same by name
        :return: ``[num_tokens, hidden_size]``
        """
        hidden_states, _ = _streams(args, kwargs)
        return torch.zeros_like(hidden_states)


class LinearizedBlock(nn.Module):
    """
    Affine map in place of a whole transformer block: what it adds to the stream.

    vLLM's blocks hand on the residual stream in one of three ways, see
    :attr:`Architecture.vllm_stream`.

    :param linear: the map
    :param stream: how the family's blocks hand on the residual stream
    """

    def __init__(self, linear: nn.Module, stream: str) -> None:
        super().__init__()
        self.linear = linear
        self.stream = stream

    def forward(
        self, *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """
        Return the residual stream after the block, as the family's blocks do.

        :param args: as vLLM's blocks are called, in the family's order: among them the
            hidden states ``[num_tokens, hidden_size]``, then the residual stream, same
            shape, or None in front of the first block
        :param kwargs: the same by name
        :return: ``sum``: what is added to the stream, and the stream before it;
            ``first``: the stream after it, and before; ``only``: the stream after it;
            ``lone``: the same, and None
        """
        hidden_states, residual = _streams(args, kwargs)
        if self.stream == "sum" and residual is not None:
            hidden_states = (hidden_states + residual).to(hidden_states.dtype)
        added, _bias = self.linear(hidden_states)
        if self.stream == "sum":
            return added, hidden_states
        after = hidden_states + added
        if self.stream == "lone":
            return after, None
        return (after, hidden_states) if self.stream == "first" else after


class ResidualAdd(nn.Module):
    """
    What vLLM's fused add-and-norm does, minus the norm.

    Stands where a norm was folded into the linear map.
    """

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Return the input of attention, and the residual stream if it was given.

        :param hidden_states: output of the previous layer's MLP
            ``[num_tokens, hidden_size]``, or the residual stream itself in layer 0
        :param residual: the residual stream before it, same shape and dtype
        :return: their sum, twice, since the input of attention is the residual stream;
            without ``residual`` just ``hidden_states``. Rounded as ``RMSNorm`` does:
            to the dtype of ``hidden_states``, after the addition.
        """
        if residual is None:
            return hidden_states
        total = (hidden_states + residual).to(hidden_states.dtype)
        return total, total


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
        _check_stages(linearized, vllm_config)
        architecture = self.architecture
        names = {
            index: maybe_prefix(prefix, architecture.attention_name(index))
            for index in linearized
        }
        with (
            _stock_class(config) if self.in_transformers else contextlib.nullcontext(),
            _left_out(architecture.attention, set(names.values()), vllm_config),
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
                linear = _make_map(
                    text_config.hidden_size,
                    spec,
                    vllm_config.quant_config,
                    maybe_prefix(prefix, f"{name}.linear"),
                    return_bias=not self.in_transformers,
                )
            replace = _replace_in_transformers if self.in_transformers else _replace
            replace(layers, architecture, index, spec, linear, vllm_config)
        _let_go_of_experts(self)  # type: ignore[arg-type]
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


def _let_go_of_experts(model: nn.Module) -> None:
    """
    Drop the experts of replaced blocks from the list that vLLM's models keep beside
    their modules, which would hold their memory.
    """
    experts: list[nn.Module] | None = getattr(model, "moe_layers", None)
    if experts is not None:
        present = {id(module) for module in model.modules()}
        experts[:] = [module for module in experts if id(module) in present]


def _replace(
    layers: nn.ModuleList,
    architecture: Architecture,
    index: int,
    spec: LinearizedLayer,
    linear: nn.Module | None,
    vllm_config: VllmConfig,
) -> None:
    """Swap the part of one layer that ``spec`` names, and have vLLM forget the old."""
    layer = layers[index]
    attention = getattr(layer, architecture.attention)
    if not isinstance(attention, LeftOut):
        # Named otherwise than expected: the same in the end, for more memory until now.
        logger.warning_once("layer %d was built with attention, then replaced", index)
        _forget(attention, vllm_config)
    if spec.kind == "block":
        assert linear is not None  # a dropped block is in no checkpoint
        if _entries(layer, vllm_config):  # experts
            _forget(layer, vllm_config)
        layers[index] = LinearizedBlock(linear, architecture.vllm_stream)
        return
    summands = get_tensor_model_parallel_world_size() if architecture.parallel else 1
    replacement = (
        DroppedAttention() if linear is None else LinearizedAttention(linear, summands)
    )
    setattr(layer, architecture.attention, replacement)
    for name in architecture.folded_norms(spec.input):
        setattr(layer, name, ResidualAdd())


def _replace_in_transformers(
    layers: nn.ModuleList,
    architecture: Architecture,
    index: int,
    spec: LinearizedLayer,
    linear: Any,
    vllm_config: VllmConfig,
) -> None:
    """Do the same in a model whose decoder layers are those of transformers."""
    old = layers[index]
    if spec.kind == "attention":
        old = old.get_submodule(architecture.attention)
    _forget(old, vllm_config)
    linearize_layer(layers, architecture, index, spec, linear)


@contextlib.contextmanager
def _stock_class(config: Any) -> Iterator[None]:
    """
    Make a linearized configuration one of the base model's class, for a time.

    transformers chooses the model by the configuration's class, and vLLM has to see
    attention in every layer, or it refuses to build any.
    """
    ours = type(config)
    config.__class__ = next(c for c in ours.__mro__ if c.__module__ != ours.__module__)
    try:
        yield
    finally:
        config.__class__ = ours


class LeftOut(nn.Module):
    """
    Keeps the place of an attention layer until what replaces it is there.

    Some of vLLM's models set something in attention once all layers are there (Ernie
    4.5 its rotary embedding); here it is lost.
    """

    def __getattr__(self, name: str) -> Any:
        """
        Return something to set attributes of.

        :param name: of a part of attention
        """
        if name.startswith("_"):
            raise AttributeError(name)
        return SimpleNamespace()


@contextlib.contextmanager
def _left_out(
    attribute: str, names: Set[str], vllm_config: VllmConfig
) -> Iterator[None]:
    """
    Take attention modules out at the moment they become part of their decoder layer.

    vLLM's classes have no common way to leave attention out, but all of them assign it
    to an attribute of the layer, and torch lets a hook change what is assigned.

    :param attribute: name of attention in a decoder layer
    :param names: full names of the attention modules to take out
    :param vllm_config: knows the attention layers built so far by their full names
    """

    context = vllm_config.compilation_config.static_forward_context

    def exchange(_: nn.Module, name: str, module: nn.Module | None) -> nn.Module | None:
        if name != attribute or module is None:
            return None
        # What has the KV cache may have the same name inside of attention (gpt-oss).
        if any(module is each for each in context.values()):
            return None
        # "model.layers.3.self_attn.attn" is inside of "model.layers.3.self_attn"
        entries = _entries(module, vllm_config)
        if names.isdisjoint(entry.rpartition(".")[0] for entry in entries):
            return None
        _forget(module, vllm_config)
        return LeftOut()

    # Annotated as if it returned nothing; documented to return a module in its place.
    handle = register_module_module_registration_hook(exchange)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _entries(module: nn.Module, vllm_config: VllmConfig) -> list[str]:
    """Return vLLM's names of the attention layers and experts inside ``module``."""
    context = vllm_config.compilation_config.static_forward_context
    # By identity, whatever vLLM calls them.
    inside = {id(each) for each in module.modules()}
    return [name for name, each in context.items() if id(each) in inside]


def _forget(replaced: nn.Module, vllm_config: VllmConfig) -> None:
    """
    Withdraw what is inside ``replaced`` from vLLM's lists of layers, and free it.

    Of those with a KV cache: without it everything would work, and no memory would be
    freed. Of mixtures of experts, which vLLM counts off one by one in each forward
    pass: with one too many the next one would use the wrong weights.
    """
    compilation = vllm_config.compilation_config
    context = compilation.static_forward_context
    names = _entries(replaced, vllm_config)
    assert names, f"{replaced} has no entry in static_forward_context"
    for name in names:
        del context[name]
        if name in compilation.static_all_moe_layers:
            compilation.static_all_moe_layers.remove(name)
    # Parameters know how they are loaded, which refers to their module: without this
    # they would stay until Python looks for cycles. Buffers are shared with layers that
    # are kept.
    for parameter in replaced.parameters():
        parameter.data = parameter.data.new_empty(0)


def _check_stages(linearized: Iterable[int], vllm_config: VllmConfig) -> None:
    """
    Refuse a placement of layers that vLLM cannot make a KV cache for.

    :param linearized: indices of the layers without attention
    :raises ValueError: naming the pipeline stages left without attention
    """
    num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    linear = set(linearized)
    num_stages = get_pp_group().world_size
    stages = [
        range(*get_pp_indices(num_layers, rank, num_stages))
        for rank in range(num_stages)
    ]
    empty = [rank for rank, stage in enumerate(stages) if linear.issuperset(stage)]
    if not empty:
        return
    if num_stages == 1:
        # Without any KV cache vLLM works, but for its prefix cache.
        if vllm_config.cache_config.enable_prefix_caching:
            raise ValueError(
                f"nbl_config: none of the {num_layers} layers has attention, so there "
                "is no KV cache, and vLLM's prefix caching needs one. Start vLLM with "
                "--no-enable-prefix-caching."
            )
        return
    if linear.issuperset(range(num_layers)):
        remedy = (
            "No layer of this model has attention: start vLLM with "
            "--pipeline-parallel-size 1."
        )
    else:
        remedy = (
            f"Layers with attention are {sorted(set(range(num_layers)) - linear)}: "
            "give each stage one of them by setting VLLM_PP_LAYER_PARTITION, the "
            f"layers per stage, now {','.join(str(len(stage)) for stage in stages)}, "
            "or use fewer stages."
        )
    raise ValueError(
        f"pipeline parallel size {num_stages}: each stage needs an attention layer, "
        "since vLLM cannot serve a stage without KV cache, got none in "
        f"{'; '.join(f'stage {rank}: {_span(stages[rank])}' for rank in empty)}. "
        f"{remedy}"
    )


def _span(stage: Sequence[int]) -> str:
    return f"layers {stage[0]} to {stage[-1]}"


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
