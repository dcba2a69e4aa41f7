# SPDX-License-Identifier: Apache-2.0
"""
Where calibration texts were in 0.1, of which the examples made use.
"""

import warnings

from nbl_modifier.evaluation.texts import STDLIB, load_texts, pack, stdlib_texts

__all__ = ["STDLIB", "load_texts", "pack", "stdlib_texts"]

warnings.warn(
    "nbl_modifier.data is going to be removed. Use: nbl_modifier.evaluation.texts",
    FutureWarning,  # shown to whoever runs the script
    stacklevel=2,
)
