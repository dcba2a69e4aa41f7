"""The layers that are measured, and where in them things sit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from nbl_modifier.architectures import Architecture
from nbl_modifier.hf.configuration_nbl import LinearizedLayer

__all__ = ["MeasuredLayers"]


@dataclass(frozen=True)
class MeasuredLayers:
    """
    The layers of a model that are measured, by decoder layer index.

    :param modules: the decoder layers
    :param names: of the attention modules inside, for messages and files
    :param architecture: names of the modules inside the layers
    :param spec: what is replaced by what, in every layer
    """

    modules: Mapping[int, nn.Module]
    names: Mapping[int, str]
    architecture: Architecture
    spec: LinearizedLayer

    @property
    def read_normalized(self) -> bool:
        """Whether the replacement reads the output of the input norm."""
        return self.spec.input == "normalized"

    def attention(self, index: int) -> nn.Module:
        """
        Return an attention module.

        :param index: of its decoder layer
        """
        return self.modules[index].get_submodule(self.architecture.attention)

    def input_norm(self, index: int) -> nn.Module | None:
        """
        Return the norm in front of attention, None in a family that has none there.

        :param index: of the decoder layer
        """
        if self.architecture.input_norm is None:
            return None
        return self.modules[index].get_submodule(self.architecture.input_norm)

    def normalized(self, index: int, stream: Tensor) -> Tensor:
        """
        Return what attention would read of a residual stream.

        :param index: of the decoder layer
        :param stream: ``[batch, tokens, d]``
        """
        norm = self.input_norm(index)
        if norm is None:
            return stream
        normalized: Tensor = norm.forward(stream)  # past the hooks on it
        return normalized

    def output_scale(self, index: int) -> float:
        """
        Return what the decoder layer multiplies attention's output by.

        :param index: of the decoder layer
        """
        scale = self.architecture.output_scale
        return 1.0 if scale is None else getattr(self.modules[index], scale)

    def added_to_stream(self, index: int, output: Tensor) -> Tensor:
        """
        Return what an output of attention adds to the residual stream.

        :param index: of the decoder layer
        :param output: ``[batch, tokens, d]``
        """
        post_norm, scale = self.architecture.post_norm, self.output_scale(index)
        if post_norm is not None:
            output = self.modules[index].get_submodule(post_norm)(output)
        return output if scale == 1.0 else output * scale
