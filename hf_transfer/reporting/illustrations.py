"""Collects what a report shows beyond results.json: the images worth a look, the map of features, calibration and the chain.

Images are chosen by the predictions of the finished run. Everything depends on the target only through its own methods
(`read_outcomes`, `list_beliefs`, `decide`, `describe_label`), so each kind of target gets what it can have.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.data.images import BadImageError
from hf_transfer.data.splits import Split
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.prefix.store import Store
from hf_transfer.reporting.chain_picture import ChainPicture, lay_out_chain
from hf_transfer.reporting.feature_map import MapMethod, place_on_plane
from hf_transfer.reporting.label_mistakes import (
    LabelMistakes,
    choose_label_mistakes,
    find_label_mistakes,
    name_mistakes,
)
from hf_transfer.reporting.number_plots import MAX_NUMBERS, NumberPlot, choose_plotted, list_numbers, plot_number
from hf_transfer.reporting.pictures import LARGE_PX, SMALL_PX, draw_heat_maps, draw_pictures
from hf_transfer.reporting.predictions import Activated, deactivate
from hf_transfer.reporting.reliability import Bin, bin_beliefs
from hf_transfer.reporting.selection import Choice, Predicted, Rows, choose_images, join_predicted
from hf_transfer.targets.target import Target

log = logging.getLogger(__name__)

LEAST_MAPPED = 3
MAX_MAPPED = 500  # points of the map
MAX_COMPUTED = 128  # points of the map if their features are not stored and must be computed
EXPLAINED = 6  # images of each gallery that get a heat map
BUDGET_BYTES = 3_600_000  # of all pictures, so that a page stays below 5 MB
FEATURES_AGREE = 2e-2  # largest relative difference between stored features and those of the saved network
TOP = 3  # outputs in a caption
_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """One image of the page, as texts. `cell` is the (true, predicted) class; `picture` and `heat` are data URIs."""

    name: str
    split: str
    truth: str
    predicted: str
    is_right: bool | None  # None: nothing is right or wrong
    top: tuple[tuple[str, str], ...]  # the first outputs with their values
    cell: tuple[int, int] | None
    picture: str
    heat: str = ""
    mistaken_labels: tuple[str, ...] = ()  # such as "missed 3": what buttons of the table of labels show

    @property
    def keys(self) -> tuple[str, ...]:
        """The buttons that show this image."""
        return self.mistaken_labels if self.cell is None else (*self.mistaken_labels, f"{self.cell[0]},{self.cell[1]}")


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """A row of images under a title. `images` are positions in `Illustrations.images`; `total` counts those not shown too."""

    title: str
    note: str
    images: tuple[int, ...]
    total: int


@dataclass(frozen=True, kw_only=True)
class MapPoint:
    """One image on the map of features, at `x` and `y` from 0 to 1."""

    image: int  # position in `Illustrations.images`
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Illustrations:
    """What the page shows beyond results.json."""

    images: tuple[ShownImage, ...]
    galleries: tuple[Gallery, ...]
    points: tuple[MapPoint, ...]
    map_method: MapMethod
    bins: tuple[Bin, ...]
    chain: ChainPicture | None
    num_suspects: int
    label_mistakes: tuple[LabelMistakes, ...] = ()  # of a target with any number of labels per image
    number_plots: tuple[NumberPlot, ...] = ()  # of a target with numbers


@dataclass(frozen=True, kw_only=True)
class FinishedModel:
    """A finished network with its chain and, if they are stored, the features (N, F) of each split that its head reads."""

    backbone: Backbone
    chain: Chain
    features: Mapping[str, Store]


def illustrate(
    splits: Sequence[Split],
    activated: Mapping[str, Activated],
    model: FinishedModel,
    results: Mapping[str, Any],
    map_method: MapMethod = "pca",
) -> Illustrations:
    """Returns the illustrations of a finished run.

    `activated`: probabilities or numbers (N, K) of each split's images, NaN for an image without a prediction, as in
    predictions.parquet. `results`: the plan and the metrics, as in results.json.
    """
    target = model.backbone.target
    logits = {name: deactivate(target, values) for name, values in activated.items()}
    predicted = join_predicted(splits, logits, results["metrics"])
    choice = choose_images(predicted, target)
    mistakes, numbers = find_label_mistakes(predicted, target), list_numbers(predicted, target)
    others = _join_unique([choice.others, choose_label_mistakes(mistakes)])
    mapped, features = _read_features(predicted, model)
    small = _join_unique([choose_plotted(numbers), mapped])
    images, number_of = _show_images(predicted, choice, (others, small), model, name_mistakes(mistakes))
    scored = predicted.scored
    beliefs = target.list_beliefs(predicted.logits[scored], predicted.labels[scored])
    return Illustrations(
        images=tuple(images),
        galleries=tuple(
            Gallery(
                title=group.title,
                note=group.note,
                total=group.total,
                images=tuple(number_of[row] for row in group.rows.tolist() if row in number_of),
            )
            for group in choice.groups
        ),
        points=tuple(_place_points(mapped, features, number_of, map_method)),
        map_method=map_method,
        bins=() if beliefs is None else tuple(bin_beliefs(*beliefs)),
        chain=lay_out_chain(model.chain, results.get("plan", ()), results.get("details", {}).get("stages", ())),
        num_suspects=choice.num_suspects,
        label_mistakes=tuple(mistakes),
        number_plots=tuple(plot_number(number, number_of) for number in numbers[:MAX_NUMBERS]),
    )


def describe_decision(target: Target, decided: Any) -> str:
    """Returns the decision on one image as text; numbers are rounded, since no network is right to six digits."""
    if target.counts_labels:
        return target.describe_label(decided) or "none"
    return ", ".join(target.describe_value(float(value)) for value in decided)


def _show_images(
    predicted: Predicted,
    choice: Choice,
    rest: tuple[Rows, Rows],
    model: FinishedModel,
    mistaken_labels: Mapping[int, tuple[str, ...]],
) -> tuple[list[ShownImage], dict[int, int]]:
    """Returns the images with their pictures, and the position of each image by its row.

    `rest`: images that buttons show, and small ones for the points of charts. Images of galleries come first, then the rest.
    The budget cuts the last ones. `mistaken_labels`: see `ShownImage`, by row.
    """
    in_gallery = _join_unique([group.rows for group in choice.groups])
    large = _join_unique([in_gallery, rest[0]])
    rows = _join_unique([large, rest[1]])
    sizes = [LARGE_PX] * len(large) + [SMALL_PX] * (len(rows) - len(large))
    pictures = draw_pictures(_places(predicted, rows), sizes)
    explained = _join_unique([group.rows[:EXPLAINED] for group in choice.groups])
    outputs = predicted.logits[explained].argmax(1).astype(np.int64)
    heat = draw_heat_maps(model.backbone, model.chain, _places(predicted, explained), outputs)
    heat_of = dict(zip(explained.tolist(), heat, strict=True))
    sizes_bytes = np.cumsum(
        [len(p) + len(heat_of.get(row, "")) for row, p in zip(rows.tolist(), pictures, strict=True)]
    )
    kept = [k for k in range(len(rows)) if pictures[k] and sizes_bytes[k] <= BUDGET_BYTES]
    describe = _Describer(predicted, choice, model.backbone.target, mistaken_labels)
    shown = [describe.make(int(rows[k]), pictures[k], heat_of.get(int(rows[k]), "")) for k in kept]
    return shown, {int(rows[k]): position for position, k in enumerate(kept)}


class _Describer:
    """Describes images with the words of the target."""

    def __init__(
        self,
        predicted: Predicted,
        choice: Choice,
        target: Target,
        mistaken_labels: Mapping[int, tuple[str, ...]],
    ) -> None:
        self._predicted, self._choice, self._target = predicted, choice, target
        self._mistaken_labels = mistaken_labels
        logits = torch.from_numpy(predicted.logits)
        self._decided = target.decide(logits).numpy()
        self._activated = target.activate(logits)
        self._order = target.order_outputs(self._activated)[:, :TOP].tolist()

    def make(self, row: int, picture: str, heat: str) -> ShownImage:
        """Returns the image in `row` with its pictures."""
        split, i = self._predicted.places[row]
        target, is_right, cells = self._target, self._choice.is_right, self._choice.cells
        is_in_matrix = cells is not None and bool(self._predicted.is_scored[row])
        is_one_number = not target.counts_labels and len(target.names) == 1  # which the decision says already
        return ShownImage(
            name=split.image_name(i),
            split=split.name,
            truth=target.describe_label(self._predicted.labels[row]) or "none",
            predicted=describe_decision(target, self._decided[row]),
            is_right=None if is_right is None else bool(is_right[row]),
            top=()
            if is_one_number
            else tuple(
                (target.names[k], target.describe_value(float(self._activated[row, k]))) for k in self._order[row]
            ),
            cell=(int(cells[row, 0]), int(cells[row, 1])) if is_in_matrix and cells is not None else None,
            picture=picture,
            heat=heat,
            mistaken_labels=self._mistaken_labels.get(row, ()),
        )


def _read_features(predicted: Predicted, model: FinishedModel) -> tuple[Rows, NDArray[Any]]:
    """Returns which scored images (M,) the map has, and their features (M, F); no image if there are no features."""
    scored = predicted.scored
    nothing = np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
    if model.chain.features is None or len(scored) < LEAST_MAPPED:
        return nothing
    try:
        if all(predicted.places[i][0].name in model.features for i in scored):
            rows = scored[_spread(len(scored), MAX_MAPPED)]
            features = np.stack([model.features[split.name][i : i + 1][0] for split, i in _places(predicted, rows)])
            if _agree(features[[0, -1]], _compute_features(predicted, rows[[0, -1]], model)):
                return rows, features.reshape(len(rows), -1)
        rows = scored[_spread(len(scored), MAX_COMPUTED)]
        return rows, _compute_features(predicted, rows, model)
    except BadImageError as error:
        log.warning("the report has no map of the images: %s", error)
        return nothing


def _agree(stored: NDArray[Any], exact: NDArray[Any]) -> bool:
    """Whether stored features are those of the saved network, and not those of an earlier one."""
    if stored.shape != exact.shape:
        return False
    return bool(np.abs(stored - exact).max() <= FEATURES_AGREE * max(float(np.abs(exact).max()), 1e-12))


def _compute_features(predicted: Predicted, rows: Rows, model: FinishedModel) -> NDArray[np.float32]:
    """Returns the features (M, F) of some images."""
    preprocessing, chain = model.backbone.preprocessing, model.chain
    device = next(chain.model.parameters()).device
    assert chain.features is not None
    parts = []
    for start in range(0, len(rows), _BATCH):
        places = _places(predicted, rows[start : start + _BATCH])
        pixels = np.stack([preprocessing.pixels(split.image(i)) for split, i in places])
        images = preprocessing.normalize(torch.from_numpy(pixels).to(device))
        (activation,) = chain.run_prefix([chain.features], images)
        parts.append(activation.flatten(1).float().cpu().numpy())
    return np.concatenate(parts)


def _places(predicted: Predicted, rows: Rows) -> list[tuple[Split, int]]:
    return [predicted.places[i] for i in rows]


def _spread(count: int, most: int) -> Rows:
    """Returns at most `most` of `count` positions, at equal distances."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _join_unique(parts: Sequence[Rows]) -> Rows:
    """Returns all rows in order, each once."""
    return np.array(list(dict.fromkeys(np.concatenate(parts).tolist())) if parts else [], np.int64)


def _place_points(
    mapped: Rows, features: NDArray[Any], number_of: Mapping[int, int], method: MapMethod
) -> list[MapPoint]:
    if not len(mapped):
        return []
    positions = place_on_plane(features, method)
    return [
        MapPoint(image=number_of[row], x=float(x), y=float(y))
        for row, (x, y) in zip(mapped.tolist(), positions, strict=True)
        if row in number_of
    ]
