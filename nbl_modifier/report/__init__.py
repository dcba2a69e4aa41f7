# SPDX-License-Identifier: Apache-2.0
"""What NBL runs measured: as data, tables, figures, a model card and a page."""

from .schema import LayerResult, NBLReport

__all__ = ["LayerResult", "NBLReport"]
