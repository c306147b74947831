"""Similarity-weighted query by committee: the samples on which compression shows.

Source: TOCO, section 3.1, after McCallum and Nigam 1998. The committee is the dense and the compressed model;
`score(x) = KL(p_dense(x) || p_compressed(x)) exp(-D(x, c(x)))`, D the distance of the sample's embedding (the
input of the dense model's last layer, standardised per feature) to the centre of its class.
"""

import numpy as np
import torch

from tvm_compress.errors import SettingError


def divergence(dense_logits: np.ndarray, compressed_logits: np.ndarray) -> np.ndarray:
    """Return KL(p_dense || p_compressed) of each sample, float64 [N] >= 0, from logits [N, classes]."""
    dense, compressed = (
        torch.log_softmax(torch.from_numpy(np.asarray(logits, np.float64)), dim=1)
        for logits in (dense_logits, compressed_logits)
    )
    return (dense.exp() * (dense - compressed)).sum(dim=1).clamp(min=0).numpy()


def distances_to_centres(embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each sample's Euclidean distance to the mean of its class, float64 [N].

    Embeddings [N, features] are standardised per feature first; a feature that never varies counts nothing.
    """
    flat = embeddings.reshape(len(embeddings), -1).astype(np.float32)
    deviation = flat.std(axis=0)
    # In place: the embeddings of a large set are not held twice more.
    flat = (flat - flat.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    distances = np.zeros(len(flat))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        centre = flat[members].mean(axis=0)
        distances[members] = np.linalg.norm(flat[members] - centre, axis=1)
    return distances


class Committee:
    """The dense model's part of the committee, computed once.

    Parameters
    ----------
    dense_logits
        [N, classes] of the samples to choose from.
    embeddings, labels
        [N, features] from the dense model, and [N].
    """

    def __init__(self, dense_logits: np.ndarray, embeddings: np.ndarray, labels: np.ndarray) -> None:
        self._dense = dense_logits
        self._distances = distances_to_centres(embeddings, labels)

    def scores(self, compressed_logits: np.ndarray) -> np.ndarray:
        """Return the logarithm of each sample's score, float64 [N]; -inf where both models agree exactly.

        The logarithm, because exp(-D) of wide embeddings is less than the smallest float.
        """
        with np.errstate(divide="ignore"):
            return np.log(divergence(self._dense, compressed_logits)) - self._distances

    def query(
        self, compressed_logits: np.ndarray, share: float, rng: np.random.Generator, count: int
    ) -> np.ndarray:
        """Draw `count` samples, without repeats, from the `share` of samples with the highest scores.

        At least `count` samples are drawn from; all of them where the models agree on all.

        Raises
        ------
        SettingError
            If the share is not in (0, 1].
        """
        if not 0 < share <= 1:
            raise SettingError(f"The share of samples to draw from must be in (0, 1], not {share}.")
        scores = self.scores(compressed_logits)
        most = max(count, int(np.ceil(share * len(scores))))
        best = np.argsort(-scores, kind="stable")[:most]
        if not np.isfinite(scores).any():
            best = np.arange(len(scores))
        return np.sort(rng.choice(best, min(count, len(best)), replace=False))
