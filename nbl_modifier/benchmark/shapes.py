# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint's config and weight files to what the roofline needs to know."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from nbl_modifier.kv_cache import RECURRENT

from .roofline import AttentionShape, ModelShape, Product

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Model", "StoredTensor", "load_model", "products", "stored_tensors"]

_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_VISION = re.compile(r"(?:^|\.)vision_")  # runs once per image, not per token
_HEAD, _EMBEDDING = "lm_head", "embed_tokens"
# Of a quantized layer, besides the weight: read with it.
_SCALES = ("weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx")
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """
    One tensor of a checkpoint.

    :param shape: of the matrix, also where several weights are packed into an integer
    :param nbytes: as stored
    """

    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Model:
    """
    A model to measure.

    :param name: directory or Hugging Face name
    :param shape: for the roofline
    :param dtype: that it runs in, such as ``bfloat16``
    :param num_layers: decoder layers
    :param linearized: indices of those without attention
    :param max_context: positions that it has
    :param vocab_size: rows of the embedding
    """

    name: str
    shape: ModelShape
    dtype: str
    num_layers: int
    linearized: tuple[int, ...]
    max_context: int
    vocab_size: int


def load_model(name: str, dtype: str, *, random_weights: bool) -> Model:
    """
    Read a model's config and the headers of its weight files.

    :param name: directory or Hugging Face name
    :param dtype: ``auto`` for that of the checkpoint
    :param random_weights: take the weights' shapes from the model class instead: there
        need be no weight files
    :raises ValueError: if it has no weight files in the safetensors format, or runs in
        a dtype that is not known here
    """
    from transformers import AutoConfig

    import nbl_modifier.hf

    nbl_modifier.hf.register()
    whole = AutoConfig.from_pretrained(name)
    # of a vision-language model, the language model: what text is generated with
    config = whole.get_text_config()
    if dtype == "auto":
        dtype = str(config.dtype or whole.dtype).removeprefix("torch.")
    if dtype not in _ITEMSIZE:
        raise ValueError(
            f"model {name}: runs in {dtype}, known are {', '.join(_ITEMSIZE)}. Pass "
            "--dtype."
        )
    width = _ITEMSIZE[dtype]
    tensors = (
        _meta_tensors(whole, width) if random_weights else stored_tensors(_folder(name))
    )
    if not tensors:
        raise ValueError(
            f"model {name}: has no *.safetensors files. Save it with save_pretrained, "
            "or pass --random-weights to measure its shape."
        )
    linearized = _linearized(whole)
    active = getattr(config, "num_experts_per_tok", None) or 1
    shape = ModelShape(
        products=products(tensors, activation_bytes=width, experts_per_token=active),
        attentions=_attentions(config, linearized),
        activation_bytes=width,
        kv_bytes=_kv_bytes(whole, width),
    )
    return Model(
        name=name,
        shape=shape,
        dtype=dtype,
        num_layers=config.num_hidden_layers,
        linearized=linearized,
        max_context=config.max_position_embeddings,
        vocab_size=config.vocab_size,
    )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """
    Return what a checkpoint's safetensors files hold, from their headers alone.

    :param folder: with ``*.safetensors``
    :raises ValueError: if one is damaged; the message names the file
    """
    tensors: dict[str, StoredTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  # it is no mapping
                    tensors[name] = _stored(name, file.get_slice(name))
        except SafetensorError as err:
            raise ValueError(
                f"{path}: cannot be read ({err}). Copy or make the checkpoint again."
            ) from err
    return tensors


def _stored(name: str, tensor: Any) -> StoredTensor:
    shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
    # "F32", "BF16", "F8_E4M3", "I64", "BOOL"
    digits = re.search(r"\d+", dtype)
    bits = int(digits[0]) if digits else 8
    nbytes = math.prod(shape) * bits // 8
    if name.endswith(".weight_packed"):
        shape = _unpacked(shape, dtype)
    return StoredTensor(shape, nbytes)


def _unpacked(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Return the shape of a matrix of 4-bit weights, the one width that is packed."""
    per_element = {"I32": 8, "U8": 2}[dtype]
    return (*shape[:-1], shape[-1] * per_element)


def products(
    tensors: Mapping[str, StoredTensor],
    *,
    activation_bytes: int,
    experts_per_token: int = 1,
) -> tuple[Product, ...]:
    """
    Return the matrix products that a model with these weights consists of.

    :param tensors: of the whole checkpoint, by name
    :param activation_bytes: width of the dtype that unquantized weights are loaded in
    :param experts_per_token: experts a router picks, where there are any
    """
    has_head = any(_HEAD in name for name in tensors)
    head = _HEAD if has_head else _EMBEDDING  # tied: the embedding is read as the head
    found: dict[str, Product] = {}
    for name, tensor in sorted(tensors.items()):
        if _VISION.search(name):
            continue
        is_head = head in name
        if not (is_head or _LAYER.search(name)) or not _is_matrix(name, tensor):
            continue
        module, _, _ = name.rpartition(".")
        *experts, outputs, inputs = tensor.shape
        product = Product(
            name=_EXPERT.sub(".experts.", name),
            inputs=inputs,
            outputs=outputs,
            nbytes=_bytes(name, module, tensors, activation_bytes),
            experts=math.prod(experts),
            active=experts_per_token if experts else 1,
            last_only=is_head,
        )
        twin = found.get(product.name)
        if twin is not None:  # another expert of the same layer
            product = replace(
                twin,
                nbytes=twin.nbytes + product.nbytes,
                experts=twin.experts + 1,
                active=experts_per_token,
            )
        found[product.name] = product
    return tuple(found.values())


def _is_matrix(name: str, tensor: StoredTensor) -> bool:
    leaf = name.rpartition(".")[2]
    # Experts that are kept in one tensor: [experts, ., .], without a "weight".
    return (
        leaf in ("weight", "weight_packed")
        and len(tensor.shape) == 2
        or (len(tensor.shape) == 3 and ".experts." in name and leaf not in _SCALES)
    )


def _bytes(
    name: str, module: str, tensors: Mapping[str, StoredTensor], activation_bytes: int
) -> float:
    scales = [tensors.get(f"{module}.{leaf}") for leaf in _SCALES]
    if any(scales):
        return tensors[name].nbytes + sum(s.nbytes for s in scales if s is not None)
    return float(math.prod(tensors[name].shape) * activation_bytes)


def _folder(name: str) -> Path:
    from transformers.utils import cached_file

    if Path(name).is_dir():
        return Path(name)
    # The engines load it from the hub when they start; the headers are needed first.
    for file in ("model.safetensors.index.json", "model.safetensors"):
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            return _with_shards(name, Path(found))
    raise ValueError(
        f"model {name}: has no safetensors files. Pass another model, or "
        "--random-weights to measure its shape."
    )


def _with_shards(name: str, found: Path) -> Path:
    from transformers.utils import cached_file

    if found.name.endswith(".index.json"):
        for shard in set(json.loads(found.read_text())["weight_map"].values()):
            cached_file(name, shard)
    return found.parent


def _meta_tensors(config: PretrainedConfig, width: int) -> dict[str, StoredTensor]:
    import torch
    import transformers

    from nbl_modifier.architectures import architecture_of

    auto_class = getattr(transformers, architecture_of(config.model_type).auto_class)
    with torch.device("meta"):
        model = auto_class.from_config(config)
    tensors = {
        name: StoredTensor(tuple(weight.shape), weight.nbytes)
        for name, weight in model.named_parameters()
    }
    return tensors | _quantized(tensors, _quantization(config), width)


def _quantized(
    tensors: Mapping[str, StoredTensor], quantization: dict[str, Any], width: int
) -> dict[str, StoredTensor]:
    """
    Return the matrices of ``Linear`` as a quantized checkpoint has them, with scales.

    :param tensors: of the model in full precision, by name
    :param quantization: of the model's configuration, as llm-compressor writes it
    :param width: bytes of a scale
    """
    found: dict[str, StoredTensor] = {}
    for group in quantization.get("config_groups", {}).values():
        weights, ignored = group.get("weights"), quantization.get("ignore", ())
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            is_linear = _LAYER.search(name) and leaf == "weight"
            if not (weights and is_linear) or len(tensor.shape) != 2:
                continue
            if module in ignored:
                continue
            outputs, inputs = tensor.shape
            scales = (outputs, inputs // (weights.get("group_size") or inputs))
            nbytes = outputs * inputs * weights["num_bits"] // 8
            found[name] = StoredTensor(tensor.shape, nbytes)
            found[f"{module}.weight_scale"] = StoredTensor(
                scales, width * math.prod(scales)
            )
    return found


def _linearized(config: Any) -> tuple[int, ...]:
    if not hasattr(config, "linearized_layers"):
        return ()
    return tuple(config.linearized_layers())


def _attentions(config: Any, linearized: tuple[int, ...]) -> tuple[AttentionShape, ...]:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    # Where only some layers have the window, layer_types says which.
    kinds = (
        getattr(config, "layer_types", None)
        or ["sliding_attention"] * config.num_hidden_layers
    )
    return tuple(
        AttentionShape(
            query_heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            window=window if kinds[index] == "sliding_attention" else None,
        )
        for index in range(config.num_hidden_layers)
        if index not in linearized and kinds[index] not in RECURRENT
    )


def _kv_bytes(config: Any, activation_bytes: int) -> int:
    scheme = _quantization(config).get("kv_cache_scheme") or {}
    return scheme.get("num_bits", 8 * activation_bytes) // 8


def _quantization(config: Any) -> dict[str, Any]:
    quantization = getattr(config, "quantization_config", None) or {}
    return quantization if isinstance(quantization, dict) else quantization.to_dict()
