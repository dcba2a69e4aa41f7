# SPDX-License-Identifier: Apache-2.0
"""What one NBL run measured, as data, tables, a figure and a model card."""

from .schema import LayerResult, NBLReport

__all__ = ["LayerResult", "NBLReport"]
