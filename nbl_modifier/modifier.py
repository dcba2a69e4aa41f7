# SPDX-License-Identifier: Apache-2.0
"""
Where NBLModifier was in 0.1. Older scripts import this before they read a recipe.
"""

import warnings

from nbl_modifier.llmcompressor_plugin.modifier import NBLModifier

__all__ = ["NBLModifier"]

warnings.warn(
    "nbl_modifier.modifier is going to be removed. "
    "Use: from nbl_modifier import NBLModifier",
    FutureWarning,  # shown to whoever runs the script
    stacklevel=2,
)
