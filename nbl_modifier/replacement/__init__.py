# SPDX-License-Identifier: Apache-2.0
"""What takes a layer's place, which layers it may be, and the exchange itself."""
