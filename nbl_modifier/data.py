# SPDX-License-Identifier: Apache-2.0
"""
Where calibration texts were in 0.1, of which the examples made use.
"""

import warnings

from nbl_modifier.evaluation.texts import STDLIB, load_texts, stdlib_texts
from nbl_modifier.evaluation.token_windows import pack

__all__ = ["STDLIB", "load_texts", "pack", "stdlib_texts"]

warnings.warn(
    "nbl_modifier.data is going to be removed. Use: nbl_modifier.evaluation.texts, or "
    "for pack nbl_modifier.evaluation.token_windows",
    FutureWarning,  # shown to whoever runs the script
    stacklevel=2,
)
