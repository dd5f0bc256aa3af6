"""Transferability scores: how well frozen features, or an upstream head's answers, fit the labels, without training.

Each takes numpy arrays and returns one number, where more is better; each names the paper that it is from. Only numbers of
one data set may be compared with one another: what a score is worth in accuracy, no paper says.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

LOGME_ITERATIONS = 100
LOGME_TOLERANCE = 1e-6  # relative change of the ratio alpha / beta
NLEEP_VARIANCE = 0.8  # share that the principal components keep
NLEEP_COMPONENTS_PER_CLASS = 5
NLEEP_ROWS_PER_COMPONENT = 4  # a mixture with fewer rows a component fits single images
KNN_NEIGHBOURS = 20
KNN_TEMPERATURE = 0.07


def compute_logme(features: NDArray[Any], labels: Labels) -> float:
    """The maximised log evidence of linear models from features (N, D) to each class's indicator, a row and class.

    LogME: arXiv 2102.11005, equations 2 to 4: y ~ N(F w, 1/beta), w ~ N(0, 1/alpha), integrated over w, maximised over
    alpha and beta by the fixed point of arXiv 2109.01087, algorithm 3. Features are taken as they are, not centred.
    """
    x = _check(features, labels)
    num_rows, num_columns = x.shape
    u, values, _ = np.linalg.svd(x, full_matrices=False)
    sigma = values**2
    evidences = []
    for label in np.unique(labels):
        target = (labels == label).astype(np.float64)
        along = (u.T @ target) ** 2  # of the target, on each singular direction
        rest = max(float(target @ target - along.sum()), 0.0)
        alpha = beta = 1.0
        for _ in range(LOGME_ITERATIONS):
            ratio = alpha / beta
            gamma = float((sigma / (sigma + ratio)).sum())
            weights = float((sigma * along / (sigma + ratio) ** 2).sum())  # |w|^2
            residual = float((along * (ratio / (sigma + ratio)) ** 2).sum()) + rest  # |F w - y|^2
            alpha = gamma / (weights + 1e-12)
            beta = (num_rows - gamma) / (residual + 1e-12)
            if abs(alpha / beta - ratio) <= LOGME_TOLERANCE * ratio:
                break
        ratio = alpha / beta
        weights = float((sigma * along / (sigma + ratio) ** 2).sum())
        residual = float((along * (ratio / (sigma + ratio)) ** 2).sum()) + rest
        log_determinant = float(np.log(alpha + beta * sigma).sum()) + (num_columns - len(sigma)) * math.log(alpha)
        evidences.append(
            0.5 * num_columns * math.log(alpha)
            + 0.5 * num_rows * math.log(beta / (2 * math.pi))
            - 0.5 * (beta * residual + alpha * weights)
            - 0.5 * log_determinant
        )
    return float(np.mean(evidences) / num_rows)


def compute_h_score(features: NDArray[Any], labels: Labels, *, shrinkage: float | None = None) -> float:
    """tr(cov(f)^-1 cov(E[f | y])) of features (N, D): how far class means lie apart, in units of the features' spread.

    H-score: arXiv 1811.01228, definition 2. With more columns than rows the covariance cannot be inverted: it is shrunk
    towards a multiple of the identity (arXiv 2110.06893, equation 4, which scales cov(E[f | y]) by 1 - shrinkage as well) by
    the amount of Ledoit and Wolf, or by `shrinkage` in 0 to 1.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    x = _check(features, labels)
    x = x - x.mean(0)
    covariance = x.T @ x / len(x)
    if shrinkage is None:
        shrinkage = float(ledoit_wolf_shrinkage(x, assume_centered=True))
    scale = float(np.trace(covariance)) / len(covariance)
    shrunk = (1 - shrinkage) * covariance + shrinkage * scale * np.eye(len(covariance))
    means, counts = _class_means(x, labels)
    between = (means.T * counts) @ means / len(x)
    return (1 - shrinkage) * float(np.trace(np.linalg.pinv(shrunk, hermitian=True) @ between))


def compute_leep(probabilities: NDArray[Any], labels: Labels) -> float:
    """Mean log-probability of the labels by way of upstream's: sum_z P(y | z) p(z | x), from probabilities (N, Z).

    LEEP: arXiv 2002.12462, equations 1 and 2: P(y, z) is the mean over images of p(z | x) where the label is y.
    """
    p = _check(probabilities, labels)
    joint = np.stack([p[labels == label].sum(0) for label in range(int(labels.max()) + 1)]) / len(p)  # (K, Z)
    given = joint / np.maximum(joint.sum(0), 1e-300)  # P(y | z)
    return float(np.log((p * given[labels]).sum(1)).mean())


def compute_nleep(features: NDArray[Any], labels: Labels, *, seed: int = 0) -> float:
    """LEEP with the components of a Gaussian mixture over features (N, D) in the place of upstream's classes.

    N-LEEP: arXiv 2011.11200, section 4.1: principal components that keep 80 % of the variance, five components a class.
    Deviations, for few images: diagonal covariances, and no more components than a quarter of the rows.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    x = _check(features, labels)
    x = PCA(NLEEP_VARIANCE, svd_solver="full").fit_transform(x)
    num_classes = len(np.unique(labels))
    components = min(NLEEP_COMPONENTS_PER_CLASS * num_classes, max(2, len(x) // NLEEP_ROWS_PER_COMPONENT))
    mixture = GaussianMixture(
        components, covariance_type="diag", reg_covar=1e-3 * float(x.var(0).mean()) + 1e-12, random_state=seed, tol=1e-2
    )
    return compute_leep(mixture.fit(x).predict_proba(x), labels)


def knn_hits(features: NDArray[Any], labels: Labels, *, neighbours: int = KNN_NEIGHBOURS) -> NDArray[np.bool_]:
    """Whether each of N rows gets its own label from its nearest other rows (N,), by cosine similarity.

    Votes are weighted by exp(similarity / 0.07) (arXiv 1805.01978, section 3.4; arXiv 2104.14294, appendix F.1), of at most
    as many neighbours as the smallest class has other rows: with more, its rows could hardly win. Leave-one-out.
    """
    x = _check(features, labels)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    present, counts = np.unique(labels, return_counts=True)
    k = max(1, min(neighbours, int(counts.min()) - 1, len(x) - 1))
    one_hot = labels[:, None] == present[None]
    hits = np.empty(len(x), np.bool_)
    for start in range(0, len(x), 1024):  # a block of rows against all
        rows = np.arange(start, min(start + 1024, len(x)))
        similarity = x[rows] @ x.T
        similarity[np.arange(len(rows)), rows] = -np.inf
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(similarity, nearest, axis=1)
        votes = (np.exp((near - 1) / KNN_TEMPERATURE)[:, :, None] * one_hot[nearest]).sum(1)
        hits[rows] = present[votes.argmax(1)] == labels[rows]
    return hits


def compute_effective_rank(features: NDArray[Any]) -> float:
    """The exponential of the entropy of the singular values' shares: directions that (N, D) features use, 1 to min(N, D).

    RankMe: arXiv 2210.02885, equation 1.
    """
    x = np.asarray(features, np.float64)
    values = np.linalg.svd(x, compute_uv=False)
    share = values / values.sum() + 1e-12
    return float(np.exp(-(share * np.log(share)).sum()))


def softmax(logits: NDArray[Any]) -> Floats:
    """Probabilities (N, Z) of logits (N, Z)."""
    z = np.asarray(logits, np.float64)
    e = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def _class_means(x: Floats, labels: Labels) -> tuple[Floats, Floats]:
    present = np.unique(labels)
    means = np.stack([x[labels == label].mean(0) for label in present])
    return means, np.array([(labels == label).sum() for label in present], np.float64)


def _check(values: NDArray[Any], labels: Labels) -> Floats:
    x = np.asarray(values, np.float64)
    if x.ndim != 2 or labels.shape != (len(x),) or not len(x):
        raise ValueError(f"values {x.shape} and labels {labels.shape}: give (N, D) and (N,), N above 0")
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).any(1).sum())} of {len(x)} rows are not finite")
    if len(np.unique(labels)) < 2:
        raise ValueError("one class only: a score compares classes")
    return x
