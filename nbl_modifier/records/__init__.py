# SPDX-License-Identifier: Apache-2.0
"""Every JSON file that is written, as data."""
