# SPDX-License-Identifier: Apache-2.0
"""llm-compressor side: the modifier, and what else its recipes need."""
