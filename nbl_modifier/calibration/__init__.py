# SPDX-License-Identifier: Apache-2.0
"""Running the model over the calibration windows, and what that costs."""
