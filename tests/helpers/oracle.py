"""The paper's algorithms as printed, in float64: what the library is held to.

Yan et al., ICPP 2020: Algorithm 2 (server; the sign of line 14 as in eq. 4 and 6b) and Algorithm 3
(worker with SAMomentum, with its division by m). Dense arrays, one threshold per layer.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def mask_of(values: Array, layers: list[slice], density: float) -> npt.NDArray[np.bool_]:
    """Mark the ceil(density * n) largest entries of each layer, ties to the lower index."""
    mask = np.zeros(len(values), dtype=bool)
    for layer in layers:
        magnitude = np.abs(values[layer])
        k = math.ceil(round(density * len(magnitude), 9))
        mask[layer.start + np.argsort(-magnitude, kind="stable")[:k]] = True
    return mask


class PaperServer:
    """Algorithm 2."""

    def __init__(self, theta: Array, layers: list[slice], density: float | None) -> None:
        """Start at `theta`; `density` None means no secondary compression."""
        self.theta_0 = theta.copy()
        self.m_t = np.zeros_like(theta)
        self.v: dict[str, Array] = {}
        self.layers, self.density = layers, density

    def join(self, k: str) -> Array:
        """Hand out theta_0 + M_t."""
        self.v[k] = self.m_t.copy()
        return self.theta_0 + self.m_t

    def receive(self, k: str, g: Array) -> Array:
        """Apply an update and return G."""
        self.m_t = self.m_t - g
        difference = self.m_t - self.v[k]
        if self.density is not None:
            difference = difference * mask_of(difference, self.layers, self.density)
        self.v[k] = self.v[k] + difference
        return difference


class PaperWorker:
    """Algorithm 3, eq. 14a-14c; the learning rate is inside the velocity."""

    def __init__(self, theta: Array, layers: list[slice], m: float, density: float) -> None:
        """Start with zero velocity."""
        self.theta = theta.copy()
        self.u = np.zeros_like(theta)
        self.layers, self.m, self.density = layers, m, density

    def update(self, step: Array) -> Array:
        """Take ``lr * gradient`` and return the part to send."""
        self.u = self.m * self.u + step
        mask = mask_of(self.u, self.layers, self.density)
        g = self.u * mask
        self.u = self.u + (1.0 / self.m - 1.0) * self.u * ~mask
        return g

    def apply(self, difference: Array) -> None:
        """Take the server's difference."""
        self.theta = self.theta + difference
