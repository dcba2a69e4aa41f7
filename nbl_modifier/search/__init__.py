# SPDX-License-Identifier: Apache-2.0
"""Which layers are replaced, and their maps fitted or trained together."""
