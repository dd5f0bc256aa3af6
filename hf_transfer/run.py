"""A finished run, in memory or in a folder: read its metrics, predict, embed and explain, save it, export it, and push it."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hf_transfer.config import ComputeConfig, ExplainBy, ExportFormat, ExportPrecision
from hf_transfer.data.every_image import load_images
from hf_transfer.displays import show_paragraph, show_table, show_title
from hf_transfer.exporting.formats import ExportOptions
from hf_transfer.exporting.records import ExportRecord
from hf_transfer.hub.exports import choose_images, export_saved
from hf_transfer.hub.publish import PublishOptions, publish
from hf_transfer.inference.embed import Pool, embed
from hf_transfer.inference.heat_maps import Explanation, make_explainer
from hf_transfer.inference.predict import ImageLike, Prediction, find_images, load_saved, predict
from hf_transfer.locations import LOCK, MODEL, find_run, is_finished
from hf_transfer.metrics.records import Metrics
from hf_transfer.network.adapters import is_adapter_folder
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import FEATURES
from hf_transfer.network.damage import read_json
from hf_transfer.output import find_free_folder, lock_folder, refuse_foreign, refuse_images, refuse_nested
from hf_transfer.processes import run_on_main
from hf_transfer.reporting.formats import format_metric
from hf_transfer.reporting.report_results import find_metrics
from hf_transfer.reporting.results import describe_run
from hf_transfer.reporting.verdict import give_verdict
from hf_transfer.runs import write_run
from hf_transfer.session import Session
from hf_transfer.targets.labels import listed
from hf_transfer.training.records import RunResult


class Run:
    """A finished run, with its metrics and its trained model. `Task.fit` and `load_run` return it.

    >>> import hf_transfer as ht
    >>> run = ht.Task("sklearn/digits", images_per_class=10).fit(ht.linear_probe())
    >>> run.test.accuracy > 0.9, run.strategy
    (True, 'linear_probe')
    """

    def __init__(
        self,
        *,
        session: Session | None = None,
        result: RunResult | None = None,
        folder: Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._session, self._result, self._trusts_code = session, result, trust_remote_code
        self.folder = folder if session is None else session.output_dir
        """The folder of the saved run; None if the run is not saved."""

    @cached_property
    def results(self) -> Mapping[str, Any]:
        """The content of results.json."""
        if self._session is not None and self._result is not None:
            return describe_run(self._session, self._result)
        assert self.folder is not None
        return read_json(self.folder / "results.json")

    @cached_property
    def metrics(self) -> Mapping[str, Metrics]:
        """The metrics by split name: `validation`, and `test` if the data has a test split."""
        if self._result is not None:
            return self._result.metrics
        return {split: Metrics.from_dict(values) for split, values in self.results["metrics"].items()}

    @property
    def test(self) -> Metrics:
        """The metrics on the test split. Raises ValueError if the data has no test split."""
        if "test" not in self.metrics:
            raise ValueError("this run has no test split; `run.validation` gives the metrics that selected the model")
        return self.metrics["test"]

    @property
    def validation(self) -> Metrics:
        """The metrics on the validation split. They are optimistic if the validation images also selected the model."""
        return self.metrics["validation"]

    @property
    def strategy(self) -> str:
        """The name of the strategy."""
        return str(self.results["strategy"])

    @property
    def plan(self) -> list[str]:
        """One sentence per phase, which says what the phase did."""
        return [phase["description"] for phase in self.results["plan"]]

    @cached_property
    def backbone(self) -> Backbone:
        """The trained network with its preprocessing and label names."""
        if self._result is not None:
            return self._result.backbone
        assert self.folder is not None
        return load_saved(str(self.folder / "model"), trust_remote_code=self._trusts_code)

    @property
    def model(self) -> nn.Module:
        """The trained network as a plain timm or transformers model."""
        return self.backbone.model

    def predict(
        self,
        images: Any,
        *,
        top_k: int = 5,
        batch_size: int = 32,
        coverage: float | None = None,
        max_error: float | None = None,
    ) -> list[Prediction]:
        """Returns the `top_k` most likely labels of each image, with sets of labels and abstention if asked for.

        `images`: a file, a folder, a PIL image, a uint8 array (H, W, 3), or a list of such items. `coverage` and `max_error`:
        see `inference.predict.predict`. Raises ValueError for a path that does not exist, and for a coverage or error that the
        model cannot promise, and BadImageError for an image that cannot be read.
        """
        inputs = _list_images(images)
        return predict(
            self.backbone, inputs, top_k=top_k, batch_size=batch_size, coverage=coverage, max_error=max_error
        )

    def embed(
        self, images: Any, *, at: str = FEATURES, pool: Pool = "mean", batch_size: int = 32
    ) -> NDArray[np.float32]:
        """Returns the embeddings `(N, *shape)` of images, which `predict` describes: by default what the head reads.

        `at`, `pool`: another cut, and the mean over its positions or the whole activation (see `inference.embed.embed`).
        Embeddings are stored in the cache, and computed once. Raises ValueError for a path that does not exist, another type
        of image, or a cut that the network does not have, and BadImageError for an image that cannot be read.

        >>> import numpy as np, hf_transfer as ht
        >>> run = ht.Task("sklearn/digits", images_per_class=10).fit(ht.linear_probe())
        >>> embeddings = run.embed([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)])
        >>> len(embeddings), embeddings.dtype
        (2, dtype('float32'))
        """
        split, compute = load_images(_list_images(images)), ComputeConfig(batch_size=batch_size)
        return embed(self.backbone, split, at=at, pool=pool, compute=compute).store[:]

    def explain(
        self, images: Any, *, label: str | None = None, method: ExplainBy = "grad_cam", at: str | None = None
    ) -> list[Explanation]:
        """Returns for each image, as `predict` describes them, which regions speak for `label`, or for its most likely label.

        `method`: Grad-CAM at the cut `at` (None: chosen, see `inference.explain.choose_map_cut`), or occlusion. Raises
        ValueError for a path that does not exist, an unknown label, or a cut without a map of the image, and BadImageError for
        an image that cannot be read.

        >>> import numpy as np, hf_transfer as ht
        >>> run = ht.Task("sklearn/digits", images_per_class=10).fit(ht.linear_probe())
        >>> (explanation,) = run.explain(np.zeros((8, 8, 3), np.uint8), label="3")
        >>> explanation.label, explanation.heat.shape, explanation.draw().size
        ('3', (32, 32), (448, 224))
        """
        names = self.backbone.label_names
        if label is not None and label not in names:
            raise ValueError(f"label={label!r}: the model has no such label; choose one of {listed(names)}")
        if at is not None and method == "occlusion":
            raise ValueError(f"at={at!r}: occlusion needs no cut; omit `at`, or choose method='grad_cam'")
        inputs = _list_images(images)
        explainer = make_explainer(self.backbone, method=method, at=at)
        labels = [label] * len(inputs) if label else [p.labels[0] for p in predict(self.backbone, inputs, top_k=1)]
        return list(explainer.explain(inputs, labels))

    def save(self, folder: str | Path) -> Path:
        """Writes config.yaml, results.json, model/ and report.html to `folder`, as a recipe does. Returns the folder.

        With several processes, all call this method, and the main process writes. Raises FileExistsError if the folder contains
        another run, and ValueError if another run is writing to the folder, if it lies inside another run's folder, or if it
        contains files of somebody else that would be replaced.
        """
        folder = Path(folder).expanduser()
        if self.folder is not None and folder.resolve() == self.folder.resolve():
            return self.folder
        with ExitStack() as locks:

            def lock() -> None:
                if is_finished(folder):
                    raise FileExistsError(
                        f"{folder} contains a finished run: choose another folder, or delete this folder"
                    )
                refuse_nested(folder)
                if self._session is not None:
                    refuse_images(folder, self._session.config.data.dataset)
                refuse_foreign(folder)
                locks.enter_context(lock_folder(folder))

            run_on_main(lock)
            if self._session is not None and self._result is not None:
                write_run(self._session.with_output(folder), self._result)
            else:
                run_on_main(lambda: self._copy(folder))
        self.folder = folder
        return folder

    def _copy(self, folder: Path) -> None:
        assert self.folder is not None
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LOCK))

    def export(
        self,
        *,
        format: ExportFormat = "onnx",  # noqa: A002 - the name of the flag
        precision: ExportPrecision = "fp32",
        with_preprocessing: bool = False,
        output_dir: str | Path | None = None,
    ) -> tuple[ExportRecord, ...]:
        """Exports the saved model to `folder/model` or to `output_dir`, and returns what is known about each file.

        An adapter is exported merged, to `output_dir`. Raises ValueError if the run is not saved, and ExportError if an
        exported file differs from the trained network.
        """
        if self.folder is None:
            raise ValueError("this run is not saved, and its export belongs to its folder: call run.save first")
        options = ExportOptions(format=format, precision=precision, with_preprocessing=with_preprocessing)
        session = self._session
        images = None if session is None else choose_images(session.data, self.results)
        return export_saved(
            self.folder, options, output_dir=output_dir, images=images, trust_remote_code=self._trusts_code
        )

    def push(self, repo_id: str, options: PublishOptions | None = None) -> str | None:
        """Verifies the model, pushes it to OWNER/NAME on the Hub, and returns the model's URL.

        A run that is not saved is first saved to `runs/<strategy>`, or to `runs/<strategy>_2` (`_3`, ...) if that exists.
        """
        folder = self.folder or self.save(run_on_main(lambda: find_free_folder(Path("runs") / self.strategy)))
        is_adapter = is_adapter_folder(str(folder / MODEL))
        published = publish(folder, repo_id, adapter=is_adapter, options=options)
        return published.url

    def _repr_html_(self) -> str:
        """Returns the result, the model that was kept, the metrics and what to do next, for notebooks."""
        verdict = give_verdict(self.results)
        interval = f", 95 % interval {verdict.interval}" if verdict.interval else ""
        shown = f"{verdict.title} {verdict.value} {verdict.unit}".rstrip()
        rows = [("metric", *self.metrics)]
        for info in find_metrics(self.results):
            values = [scores.get(info.key) for scores in self.results["metrics"].values()]
            if any(value is not None for value in values):
                rows.append((info.title, *("" if v is None else str(format_metric(v, info)) for v in values)))
        next_steps = "".join(map(show_paragraph, verdict.next_steps))
        title = show_title(f"{self.strategy}: {shown} on {verdict.images}{interval}")
        return title + show_paragraph(verdict.kept) + show_table(rows) + next_steps

    def __repr__(self) -> str:
        qualities = ", ".join(
            f"{split} {m.score.titles[0]} {m.score.format_quality()}" for split, m in self.metrics.items()
        )
        return f"<Run {self.strategy}: {qualities}>"


def _list_images(images: Any) -> list[ImageLike]:
    """Returns the image files of paths and folders, and the PIL images and arrays, of one such item or a list of them."""
    given = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    inputs: list[ImageLike] = []
    for image in given:
        inputs += find_images([image]) if isinstance(image, str | Path) else [image]
    return inputs


def load_run(folder: str | Path, *, trust_remote_code: bool = False) -> Run:
    """Returns the finished run that `folder` contains. Raises ValueError if the folder contains no finished run.

    `trust_remote_code`: run the Python code in the folder's model, if the model was fine-tuned from one with code of its own.
    """
    folder = find_run(folder)
    if not (folder / "results.json").is_file() or not (folder / "model").is_dir():
        raise ValueError(f"{folder}: no finished run in this folder (results.json or model/ is missing)")
    return Run(folder=folder, trust_remote_code=trust_remote_code)
