"""Labels of any number and numbers on real images: the probe beside scikit-learn, and fine-tuning beside transformers' Trainer.

    python benchmarks/targets.py --data DATA [--only pairs angles digits] [--checkpoints mobilenetv2 deit_tiny]

DATA contains `checkpoints/` and `datasets/`. The script makes two data sets from the images of `trashnet`, by a seed. Train
pictures come from train images, and test pictures from test images:

  pairs    two images of different classes side by side; the labels are both classes
  angles   one image, rotated by -45 to 45 degrees, without its corners; the number is the angle
  digits   no new pictures: the digit that a hand of `sign_digits` shows, as a number

The probe reads the same features as scikit-learn's linear models, with the same grid of C (1 / alpha for ridge regression) and
five folds. scikit-learn chooses a C for each label by log-loss. It runs on features of unit variance (`scikit-learn`), and on
features scaled as the probe scales them, which has less trust in features that hardly vary (`scikit-learn, scaled alike`).
Trainer gets the settings `tuned` of
`trainer_example.py`, the same epochs as ours, and BCE. Every result is written to --output as soon as it is measured.
"""

import argparse
import csv
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.linalg import LinAlgWarning
from sklearn.base import clone
from sklearn.linear_model import LogisticRegressionCV, Ridge
from sklearn.metrics import average_precision_score, r2_score
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision import transforms
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from hf_transfer.data.splits import Split
from hf_transfer.runs import open_session, train_session
from hf_transfer.session import Session
from hf_transfer.settings import replace_settings
from hf_transfer.solvers.probe import DEFAULT_C_GRID, SPREAD_FLOOR
from hf_transfer.strategy import default_config
from hf_transfer.training.readouts import extract_readouts

CHECKPOINTS = {"mobilenetv2": "mobilenetv2_100.tflite_quant_in1k", "deit_tiny": "deit_tiny_patch16_224.fix_in1k"}
COUNTS = {"train": 1000, "test": 400}  # pictures
SIDE_PX, SOURCE_PX = 128, 192  # side of one image of a pair; the smaller side of an image of trashnet
MAX_DEGREES = 45.0
FOLDS = 5
TRAINER: dict[str, Any] = {"learning_rate": 1e-4, "lr_scheduler_type": "cosine", "weight_decay": 0.05}
NO_FLIP = {"hflip": 0.0}  # a mirrored image has the opposite angle

log = logging.getLogger("benchmark")


# --- data sets ----------------------------------------------------------------------------------------------------------


def list_images(trashnet: Path, split: str) -> list[Path]:
    """Returns the images of a split of trashnet, sorted."""
    return sorted((trashnet / split).rglob("*.jpg"))


def crop_square(path: Path) -> Image.Image:
    """Returns the largest square in the middle of an image."""
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def make_pair(paths: list[Path], rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Returns two random images of different classes side by side on a white square, and both classes."""
    first, second = rng.choice(len(paths), 2)
    while paths[first].parent.name == paths[second].parent.name:
        second = rng.integers(len(paths))
    picture = Image.new("RGB", (2 * SIDE_PX, 2 * SIDE_PX), "white")
    for k, path in enumerate((paths[first], paths[second])):
        half = crop_square(path).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
        picture.paste(half, (k * SIDE_PX, SIDE_PX // 2))
    return picture, "|".join(sorted({paths[first].parent.name, paths[second].parent.name}))


def make_rotated(paths: list[Path], rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Returns the middle of a rotated random image, and the angle in degrees.

    The middle has the same size for every angle, and lies within the image for each of them.
    """
    angle = rng.uniform(-MAX_DEGREES, MAX_DEGREES)
    image = crop_square(paths[rng.integers(len(paths))]).resize((SOURCE_PX, SOURCE_PX), Image.Resampling.BICUBIC)
    side = int(SOURCE_PX / 2**0.5)
    start = (SOURCE_PX - side) // 2
    rotated = image.rotate(angle, Image.Resampling.BICUBIC)
    return rotated.crop((start, start, start + side, start + side)), f"{angle:.3f}"


def make_table(
    make: Callable[[list[Path], np.random.Generator], tuple[Image.Image, str]], trashnet: Path, folder: Path
) -> Path:
    """Writes pictures and a table of their labels to `folder`. Returns the path of the table."""
    folder.mkdir()
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "split"])
        for seed, (split, count) in enumerate(COUNTS.items()):
            paths, rng = list_images(trashnet, split), np.random.default_rng(seed)
            for i in range(count):
                picture, label = make(paths, rng)
                picture.save(folder / f"{split}_{i}.png")
                writer.writerow([f"{split}_{i}.png", label, split])
    return folder / "labels.csv"


def find_data(name: str, data: Path, scratch: Path) -> dict[str, Any]:
    """Returns the settings of a data set, which is made first if it is not stored."""
    if name == "digits":
        return {"dataset": str(data / "datasets" / "sign_digits"), "problem_type": "regression"}
    make = make_pair if name == "pairs" else make_rotated
    table = make_table(make, data / "datasets" / "trashnet", scratch / name)
    problem_type = "multi_label_classification" if name == "pairs" else "regression"
    return {"dataset": str(table), "label_column": "label", "split_column": "split", "problem_type": problem_type}


# --- runs ---------------------------------------------------------------------------------------------------------------


def open_run(strategy: str, settings: dict[str, Any]) -> Session:
    """Opens a session of the strategy."""
    return open_session(replace_settings(default_config(strategy), settings))


def run_strategy(strategy: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the test metrics of a strategy, with intervals, and its epochs."""
    session = open_run(strategy, settings)
    result = train_session(session)
    assert result.test is not None
    values = {**result.test.values, **{f"{k}_interval": list(v) for k, v in result.test.intervals.items()}}
    c = result.phases[0].regularization_c
    epochs = {"epochs": settings["epochs"]} if "epochs" in settings else {}
    return {**values, **({} if c is None else {"c": c}), **epochs}


class FlooredScaler(StandardScaler):  # type: ignore[misc]  # scikit-learn ships no types
    """Scales as the probe does: adds the square of the median standard deviation to each variance."""

    def fit(self, features: Any, labels: Any = None, sample_weight: Any = None) -> Any:
        """Called by scikit-learn."""
        super().fit(features, labels, sample_weight)
        self.scale_ = np.sqrt(self.var_ + SPREAD_FLOOR * np.median(np.sqrt(self.var_)) ** 2)
        return self


def fit_scikit_learn(settings: dict[str, Any], scaler: StandardScaler) -> dict[str, Any]:
    """Returns the test score of scikit-learn's linear models on the features of the probe."""
    session = open_run("linear_probe", settings)
    stores = extract_readouts(session, sweep="none")[0][0].stores
    data = session.data
    assert data.test is not None
    features = np.concatenate([stores["train"][:], stores["validation"][:]])
    labels, unseen = np.concatenate([data.train.labels, data.validation.labels]), stores["test"][:]
    if data.target.counts_labels:
        fits = [fit_label(scaler, features, labels[:, k].astype(int)) for k in range(labels.shape[1])]
        scores = np.stack([fit.decision_function(unseen) for fit in fits], 1)
        found = average_precision_score(data.test.labels, scores, average="macro")
        return {"mean_average_precision": float(found), "c": [np.ravel(fit[-1].C_).item() for fit in fits]}
    grid = {"ridge__alpha": [1 / c for c in DEFAULT_C_GRID]}
    values = (labels - labels.mean(0)) / labels.std(0)
    folds = KFold(FOLDS, shuffle=True, random_state=0)
    model = make_pipeline(scaler, Ridge())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LinAlgWarning)  # a large C hardly penalizes features that nearly repeat others
        fit = GridSearchCV(model, grid, cv=folds, scoring="neg_mean_squared_error").fit(features, values)
    predicted = fit.predict(unseen).reshape(len(unseen), -1) * labels.std(0) + labels.mean(0)
    return {"r2": float(r2_score(data.test.labels, predicted)), "c": 1 / fit.best_params_["ridge__alpha"]}


def fit_label(scaler: StandardScaler, features: NDArray[Any], labels: NDArray[Any]) -> Any:
    """Returns the logistic regression of one label, with C chosen by log-loss."""
    model = LogisticRegressionCV(Cs=list(DEFAULT_C_GRID), cv=FOLDS, scoring="neg_log_loss", max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about names of attributes in later versions
        return make_pipeline(clone(scaler), model).fit(features, labels)


def run_trainer(settings: dict[str, Any], epochs: int, scratch: Path) -> dict[str, Any]:
    """Returns the test score of Trainer with BCE, on the same train images, for `epochs` epochs."""
    data = open_run("full", settings).data
    checkpoint = settings["checkpoint"]
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    torch.manual_seed(0)  # the new head's weights
    model = AutoModelForImageClassification.from_pretrained(
        checkpoint,
        num_labels=data.target.num_outputs,
        problem_type="multi_label_classification",
        ignore_mismatched_sizes=True,
    )
    config = processor.data_config
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(config["input_size"][1:]),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(config["mean"], config["std"]),
        ]
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(scratch / "trainer"), num_train_epochs=epochs, per_device_train_batch_size=32, seed=0,
            report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=True, **TRAINER,
        ),
        train_dataset=torch.utils.data.ConcatDataset([Pictures(s, augment) for s in (data.train, data.validation)]),
    )  # fmt: skip
    trainer.train()
    assert data.test is not None
    logits = trainer.predict(Pictures(data.test, processor.val_transforms)).predictions
    found = average_precision_score(data.test.labels, logits, average="macro")
    return {"mean_average_precision": float(found), "epochs": epochs}


class Pictures(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The images of a split as Trainer reads them."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        pixels = self.transform(self.split.image(i))
        return {"pixel_values": pixels, "labels": torch.from_numpy(self.split.labels[i])}


def list_steps(name: str, settings: dict[str, Any], given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Returns the functions that measure the results of a data set, by name."""
    trained = {**settings, "epochs": given.epochs, "tracker": "none", **(NO_FLIP if name == "angles" else {})}
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "scikit-learn": lambda: fit_scikit_learn(settings, StandardScaler()),
        "scikit-learn, scaled alike": lambda: fit_scikit_learn(settings, FlooredScaler()),
        "linear_probe without readouts": lambda: run_strategy("linear_probe", {**settings, "readouts": "none"}),
        "linear_probe": lambda: run_strategy("linear_probe", settings),
        "last_layers": lambda: run_strategy("last_layers", trained),
        "probe_then_full": lambda: run_strategy("probe_then_full", trained),
    }
    if name == "pairs":
        return steps | {"Trainer": lambda: run_trainer(settings, given.epochs, scratch)}
    return steps | {"full": lambda: run_strategy("full", trained)}


def main() -> None:
    """Measures what is asked for, and adds it to the file of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with checkpoints/ and datasets/")
    parser.add_argument(
        "--only", nargs="+", choices=("pairs", "angles", "digits"), default=["pairs", "angles", "digits"]
    )
    parser.add_argument("--checkpoints", nargs="+", choices=tuple(CHECKPOINTS), default=list(CHECKPOINTS))
    parser.add_argument("--steps", nargs="+", help="names of the steps to run; default: all")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of all fine-tuning")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/targets.json"))
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    results: dict[str, Any] = json.loads(given.output.read_text()) if given.output.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            data = find_data(name, given.data, Path(folder))
            for checkpoint in given.checkpoints:
                settings = {**data, "checkpoint": str(given.data / "checkpoints" / CHECKPOINTS[checkpoint])}
                rows = results.setdefault(name, {}).setdefault(checkpoint, {})
                for step, measure in list_steps(name, settings, given, Path(folder)).items():
                    if given.steps and step not in given.steps:
                        continue
                    rows[step] = measure()
                    log.info("%s, %s, %s: %s", name, checkpoint, step, json.dumps(rows[step]))
                    given.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
