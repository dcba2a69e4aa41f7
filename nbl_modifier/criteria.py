# SPDX-License-Identifier: Apache-2.0
"""What layers are ranked by. Standard library only."""

__all__ = ["TRIED"]

#: Criteria that are measured by trying a replacement on held-out windows, in nats per
#: token: the increase of the mean negative log-likelihood, the divergence of the
#: next-token distributions from the original model's, and that divergence times the
#: angle, in radians, by which the original layer turns the residual stream.
TRIED = ("loss", "kl", "kl_angle")
