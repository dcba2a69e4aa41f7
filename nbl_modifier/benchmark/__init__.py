# SPDX-License-Identifier: Apache-2.0
"""
Speed of a base model and its compressed counterpart, side by side: each in a process of
its own, measured in turn, beside what bytes and floating-point operations predict.
"""
