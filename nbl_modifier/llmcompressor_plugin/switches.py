"""What a run switches on in llm-compressor and torch, and off again."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from nbl_modifier.layer_statistics.windows import rewind_generator
from nbl_modifier.numerics.products import FastProducts

from .session import running_oneshot
from .upstream import (
    FusedAttention,
    hide_bars,
    keep_causal_mask,
    release_causal_mask,
    show_bars,
)

__all__ = ["Switches"]


class Switches:
    """
    What is on until the modifier is finalized, and within that until its search ends.

    Made when the modifier is initialized: llm-compressor changes what attention decides
    by when it calibrates.

    :param model: the causal language model, as it was loaded
    """

    def __init__(self, model: PreTrainedModel) -> None:
        #: Closed when the search has ended.
        self.of_pass = ExitStack()
        self._all = ExitStack()
        self._fused_attention: FusedAttention | None = FusedAttention(model)
        self._products = FastProducts()
        keep_causal_mask()
        self._all.callback(release_causal_mask)
        self._all.push(self.of_pass)

    def start_pass(self) -> None:
        """Have calibration run as it should."""
        oneshot = running_oneshot()
        if oneshot is not None:
            # Nothing changes during this pass, so running every layer a second time
            # to propagate the change would only double its cost. The pipeline reads
            # the argument layer by layer.
            arguments = oneshot.dataset_args
            self.of_pass.callback(
                setattr, arguments, "propagate_error", arguments.propagate_error
            )
            arguments.propagate_error = False
        # The pipeline draws this pass's samples next. Later passes draw what they would
        # have drawn.
        self.of_pass.callback(torch.random.set_rng_state, rewind_generator())
        # It holds the attention modules, those that are about to be freed too.
        fused, self._fused_attention = self._fused_attention, None
        assert fused is not None
        fused.switch_on()
        self.of_pass.callback(fused.switch_off)
        hide_bars()
        self.of_pass.callback(show_bars)
        # Until the end of the run: the passes of later modifiers are as slow otherwise.
        self._products.switch_on()
        self._all.callback(self._products.switch_off)

    def close(self) -> None:
        """Leave nothing switched on."""
        self._all.close()
