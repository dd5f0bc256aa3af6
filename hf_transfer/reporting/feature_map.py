"""Places images on a plane by their features, so that similar images lie close together: by PCA, or by UMAP if installed.

PCA is the default, because it is deterministic and takes a fraction of a second. UMAP (arXiv 1802.03426) shows clusters better,
and takes longer.
"""

import importlib.util
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

MapMethod = Literal["pca", "umap"]


def check_map_method(method: MapMethod) -> None:
    """Raises ValueError, before anything is computed, if the package for `method` is not installed."""
    if method == "umap" and importlib.util.find_spec("umap") is None:
        raise ValueError(
            "map='umap': the package umap-learn is not installed; run pip install umap-learn, or omit --map"
        )


def place_on_plane(features: NDArray[Any], method: MapMethod = "pca") -> NDArray[np.float64]:
    """Returns positions (N, 2) from 0 to 1 for features (N, F) of at least three images.

    >>> place_on_plane(np.array([[0.0, 0, 0], [1, 0, 0], [4, 0, 0]]))[:, 0].round(2).tolist()
    [0.0, 0.25, 1.0]
    """
    positions = _project(features.astype(np.float64)) if method == "pca" else _run_umap(features)
    low, high = positions.min(0), positions.max(0)
    return np.asarray((positions - low) / np.where(high > low, high - low, 1.0))


def _project(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the first two principal components (N, 2), from the Gram matrix (N, N), as N is smaller than F."""
    centered = features - features.mean(0)
    values, vectors = np.linalg.eigh(centered @ centered.T)  # in ascending order
    components = vectors[:, :-3:-1] * np.sqrt(np.maximum(values[:-3:-1], 0.0))
    largest = np.abs(components).argmax(0)  # an eigenvector's sign is arbitrary
    signs = np.where(components[largest, [0, 1]] < 0, -1.0, 1.0)
    return np.asarray(components * signs)


def _run_umap(features: NDArray[Any]) -> NDArray[np.float64]:
    import umap  # type: ignore[import-not-found, unused-ignore]

    neighbors = min(15, len(features) - 1)
    return np.asarray(umap.UMAP(n_neighbors=neighbors, random_state=0, n_jobs=1).fit_transform(features), np.float64)
