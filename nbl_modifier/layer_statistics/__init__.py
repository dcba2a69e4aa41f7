# SPDX-License-Identifier: Apache-2.0
"""What is known of a layer: its moments, on which windows, kept where."""
