"""Distances between two sets of features, in float64: Frechet (arXiv 1706.08500) and kernel (arXiv 1801.01401)."""

from __future__ import annotations

import numpy as np
from scipy.linalg import lapack

BLOCK = 512


class FeatureStatistics:
    """Mean and covariance of feature vectors that come in pieces, in memory that does not grow with their number.

    Vectors are summed in blocks of fixed length about the running mean (Chan, Golub and LeVeque, "Updating formulae",
    1979): no cancellation, and the same bits however the vectors were cut into batches.
    """

    def __init__(self, dims: int) -> None:
        self.mean = np.zeros(dims)
        self.scatter = np.zeros((dims, dims))  # sum of outer products about the mean
        self._merged = 0  # vectors in mean and scatter
        self._block = np.empty((BLOCK, dims))
        self._filled = 0  # vectors waiting in the block

    @property
    def count(self) -> int:
        """Vectors added so far."""
        return self._merged + self._filled

    def update(self, features: np.ndarray) -> None:
        """Adds features [N, dims]."""
        while len(features):
            piece, features = np.split(features, [BLOCK - self._filled])
            self._block[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            if self._filled == BLOCK:
                self._merge()

    def _merge(self) -> None:
        block, added = self._block[: self._filled], self._filled
        mean = block.mean(axis=0)
        centred = block - mean
        step = mean - self.mean
        total = self._merged + added
        self.scatter += centred.T @ centred
        if self._merged:
            self.scatter += np.outer(step, step * (self._merged * added / total))
        self.mean += step * (added / total)
        self._merged, self._filled = total, 0

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [dims] and covariance [dims, dims] (divided by N - 1). Raises ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two feature vectors, not {self.count}")
        if self._filled:
            self._merge()
        return self.mean, self.scatter / (self.count - 1)


def frechet_distance(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> float:
    """Squared Frechet distance of two Gaussians, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), equation 6 of 1706.08500.

    Means are [dims], covariances [dims, dims], which may be singular. Raises ValueError where it is not finite.
    """
    difference = mean_1 - mean_2
    traces = np.trace(covariance_1) + np.trace(covariance_2)
    distance = float(difference @ difference + traces - 2 * trace_of_root(covariance_1, covariance_2))
    if not np.isfinite(distance):  # max would make 0 of NaN
        raise ValueError(f"the distance is {distance}: the statistics are not finite, or too large")
    return max(0.0, distance)


def is_semidefinite(covariance: np.ndarray) -> bool:
    """Whether a symmetric matrix [dims, dims] has no negative eigenvalue, up to the rounding of float32."""
    tolerance = 1e-6 * max(np.trace(np.abs(covariance)), np.finfo(np.float64).tiny)
    try:
        np.linalg.cholesky(covariance + tolerance * np.eye(len(covariance)))
    except np.linalg.LinAlgError:
        return False
    return True


def trace_of_root(covariance_1: np.ndarray, covariance_2: np.ndarray) -> float:
    """tr((C1 C2)^(1/2)) of two positive semi-definite matrices [dims, dims].

    With C1 = L L^T the product C1 C2 has the eigenvalues of the symmetric L^T C2 L, and the trace is the sum of their
    roots. L is a pivoted Cholesky factor, which stops at the rank: cheaper than an eigendecomposition of C1, smaller
    for few images, and at home with singular matrices.
    """
    factor_1, factor_2 = _factor(covariance_1), _factor(covariance_2)
    if factor_1.shape[1] <= factor_2.shape[1]:  # the lower rank outside: fewer eigenvalues that are only rounding
        symmetric = factor_1.T @ covariance_2 @ factor_1
    else:
        symmetric = factor_2.T @ covariance_1 @ factor_2
    return float(np.sqrt(np.linalg.eigvalsh(symmetric).clip(min=0)).sum())


def _factor(covariance: np.ndarray) -> np.ndarray:
    """L [dims, rank] with L L^T equal to the covariance [dims, dims] up to rounding."""
    if not covariance.any():  # LAPACK would report a rank of 1
        return np.zeros((len(covariance), 0))
    packed, pivots, rank, _ = lapack.dpstrf(covariance, lower=1)
    factor = np.zeros((len(covariance), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    return factor


def kernel_distance(features_1: np.ndarray, features_2: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy (equation 4 of 1801.01401) of features [N, dims] and [M, dims].

    The kernel is (x.y / dims + 1)^3, the sum over all pairs at once: the value around which the customary mean over a
    hundred random subsets of a thousand images scatters. Needs at least two features each.
    """
    n, m = len(features_1), len(features_2)
    within_1 = _kernel_sum(features_1, features_1, without_diagonal=True) / (n * (n - 1))
    within_2 = _kernel_sum(features_2, features_2, without_diagonal=True) / (m * (m - 1))
    return within_1 + within_2 - 2 * _kernel_sum(features_1, features_2, without_diagonal=False) / (n * m)


def _kernel_sum(features_1: np.ndarray, features_2: np.ndarray, without_diagonal: bool) -> float:
    dims = features_1.shape[1]
    features_2 = features_2.astype(np.float64)
    total = 0.0
    for start in range(0, len(features_1), BLOCK):  # in blocks, so that the kernel matrix is never whole
        block = features_1[start : start + BLOCK].astype(np.float64)
        total += ((block @ features_2.T / dims + 1) ** 3).sum()
        if without_diagonal:
            total -= ((np.square(block).sum(axis=1) / dims + 1) ** 3).sum()
    return float(total)
