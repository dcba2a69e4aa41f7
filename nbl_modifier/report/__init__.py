# SPDX-License-Identifier: Apache-2.0
"""What NBL runs measured: as tables, figures, a model card and a page."""
