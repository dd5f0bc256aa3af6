"""Metrics: equal to scikit-learn's, computed offline, each image counted once."""

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy.stats import binomtest
from sklearn import metrics as sklearn_metrics

from hf_transfer.metrics import classification, multi_label, regression
from hf_transfer.metrics.bootstrap import Bootstrap, mean_interval, resample_indices
from hf_transfer.metrics.classification import read_outcomes
from hf_transfer.metrics.formulas import count_images_to_tell_apart
from hf_transfer.metrics.records import Metrics
from hf_transfer.training.gather import gather_rows

# 3 classes, 5 images; the predictions are 0, 1, 1, 2, 0
HAND_PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.9, 0.05, 0.05]])
HAND_LABELS = np.array([0, 1, 2, 2, 1])


def score(logits: Any, labels: Any, names: Sequence[str], *, seed: int = 0, resamples: int = 1000) -> Metrics:
    return classification.score(read_outcomes(logits, labels), names, Bootstrap(seed=seed, resamples=resamples))


def _names(num_classes: int) -> list[str]:
    return [f"class {index}" for index in range(num_classes)]


def _random_case(
    num_samples: int, num_classes: int, present: list[int], seed: int = 0
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    labels = generator.choice(present, size=num_samples)
    logits = generator.normal(size=(num_samples, num_classes)).astype(np.float32)
    logits[np.arange(num_samples), labels] += 1.0
    return logits, labels


def test_hand_computed_case() -> None:
    result = score(np.log(HAND_PROBABILITIES), HAND_LABELS, ["a", "b", "c"], resamples=0)
    assert result.accuracy == pytest.approx(3 / 5)
    assert result.balanced_accuracy == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    # F1 = 2 hits / (support + predicted): a 2/(1+2), b 2/(2+2), c 2/(2+1)
    assert result.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert result.nll == pytest.approx(-np.log([0.7, 0.6, 0.3, 0.8, 0.05]).mean())
    # confidences 0.7, 0.6, 0.8 of hits and 0.5, 0.9 of misses lie in five bins of one image each
    assert result.ece == pytest.approx((0.3 + 0.4 + 0.2 + 0.5 + 0.9) / 5)
    assert result.confusion_matrix == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert result.num_samples == 5
    assert result.per_class[1] == {"label": "b", "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert "top5_accuracy" not in result.values
    assert not any(name.endswith("_interval") or name == "top5_accuracy" for name in result.to_dict())


@pytest.mark.parametrize("present", [list(range(8)), [0, 2, 3, 7], [5]], ids=["all", "some absent", "one"])
def test_matches_scikit_learn(present: list[int]) -> None:
    num_classes = 8
    logits, labels = _random_case(400, num_classes, present)
    result = score(logits, labels, _names(num_classes), resamples=0)
    predictions = logits.argmax(axis=1)
    every = list(range(num_classes))

    assert result.accuracy == pytest.approx(sklearn_metrics.accuracy_score(labels, predictions))
    recalls = sklearn_metrics.recall_score(labels, predictions, labels=present, average=None, zero_division=0)
    assert result.balanced_accuracy == pytest.approx(np.mean(recalls))
    assert result.macro_f1 == pytest.approx(
        sklearn_metrics.f1_score(labels, predictions, labels=present, average="macro", zero_division=0)
    )
    probabilities = torch.from_numpy(logits).double().softmax(dim=1).numpy()
    assert result.nll == pytest.approx(sklearn_metrics.log_loss(labels, probabilities, labels=every))
    assert result.top5_accuracy == pytest.approx(
        sklearn_metrics.top_k_accuracy_score(labels, logits, k=5, labels=every)
    )
    matrix = sklearn_metrics.confusion_matrix(labels, predictions, labels=every)
    assert result.confusion_matrix == matrix.tolist()
    expected = sklearn_metrics.precision_recall_fscore_support(labels, predictions, labels=every, zero_division=0)
    for row, precision, recall, f1, support in zip(result.per_class, *expected, strict=True):
        assert row["support"] == support
        wanted = (precision, recall, f1) if support else (None, None, None)
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx(wanted)


def test_balanced_accuracy_is_scikit_learns_where_all_predicted_classes_are_present() -> None:
    logits, labels = _random_case(300, 6, [0, 2, 5])
    logits[:, [1, 3, 4]] = -100  # scikit-learn warns where an absent class is predicted
    result = score(logits, labels, _names(6), resamples=0)
    expected = sklearn_metrics.balanced_accuracy_score(labels, logits.argmax(axis=1))
    assert result.balanced_accuracy == pytest.approx(expected)


def test_absent_classes_are_null_and_noted() -> None:
    logits, labels = _random_case(50, 4, [0, 2])
    result = score(logits, labels, ["ant", "bee", "cat", "dog"], resamples=0)
    assert [row["recall"] is None for row in result.per_class] == [False, True, False, True]
    assert "2 of 4 classes" in result.notes[0]
    assert "bee, dog" in result.notes[0]
    assert score(*_random_case(50, 2, [0, 1]), ["a", "b"], resamples=0).notes == ()


def test_a_class_present_but_never_predicted_has_precision_zero() -> None:
    logits = np.array([[1.0, 0.0], [1.0, 0.0]])
    row = score(logits, np.array([0, 1]), ["a", "b"], resamples=0).per_class[1]
    assert (row["precision"], row["recall"], row["f1"]) == (0.0, 0.0, 0.0)


def test_calibration_error_weighs_bins_by_their_images() -> None:
    # 4 images in the bin (0.8, 0.867] of which 3 are right, 1 in (0.533, 0.6], wrong
    confidences = np.array([0.84, 0.84, 0.84, 0.84, 0.58])
    logits = np.log(np.stack([confidences, 1 - confidences], axis=1))
    result = score(logits, np.array([0, 0, 0, 1, 1]), ["a", "b"], resamples=0)
    assert result.ece == pytest.approx((4 * abs(3 / 4 - 0.84) + 1 * 0.58) / 5)


def test_calibration_error_of_calibrated_predictions_is_small() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(5), size=20_000)
    labels = (probabilities.cumsum(axis=1) < generator.random((20_000, 1))).sum(axis=1)
    calibrated = score(np.log(probabilities), labels, _names(5), resamples=0).ece
    # Sampling error of a bin of about 1500 images: at most sqrt(0.2 / 1500) = 0.012.
    assert calibrated < 0.02
    assert score(3 * np.log(probabilities), labels, _names(5), resamples=0).ece > 0.1


def test_ties_go_to_the_lower_class_in_every_metric() -> None:
    logits = np.zeros((8, 8))
    outcomes = read_outcomes(logits, np.arange(8))
    assert outcomes.label_ranks.tolist() == list(range(8))
    result = score(logits, np.arange(8), _names(8), resamples=0)
    assert (result.accuracy, result.top5_accuracy) == (1 / 8, 5 / 8)


def test_bootstrap_equals_scikit_learn_on_each_resample() -> None:
    num_classes, resamples = 5, 60
    logits, labels = _random_case(40, num_classes, list(range(num_classes)))
    result = score(logits, labels, _names(num_classes), seed=3, resamples=resamples)
    predictions = logits.argmax(axis=1)
    log_probabilities = torch.from_numpy(logits).double().log_softmax(dim=1).numpy()
    drawn: dict[str, list[float]] = {
        "accuracy": [],
        "balanced_accuracy": [],
        "macro_f1": [],
        "nll": [],
    }
    for indices in np.concatenate(list(resample_indices(40, seed=3, resamples=resamples))):
        true, predicted = labels[indices], predictions[indices]
        present = np.unique(true)
        recalls = sklearn_metrics.recall_score(true, predicted, labels=present, average=None, zero_division=0)
        drawn["accuracy"].append(np.mean(true == predicted))
        drawn["balanced_accuracy"].append(np.mean(recalls))
        drawn["macro_f1"].append(
            sklearn_metrics.f1_score(true, predicted, labels=present, average="macro", zero_division=0)
        )
        drawn["nll"].append(-log_probabilities[indices, true].mean())
    for name, values in drawn.items():
        expected = np.quantile(values, [0.025, 0.975])
        assert getattr(result, f"{name}_interval") == pytest.approx(expected), name
        low, high = getattr(result, f"{name}_interval")
        assert low <= getattr(result, name) <= high


def test_accuracy_interval_is_the_binomial_one_for_many_images() -> None:
    logits, labels = _random_case(4000, 3, [0, 1, 2])
    result = score(logits, labels, _names(3))
    accuracy = result.accuracy
    standard_error = np.sqrt(accuracy * (1 - accuracy) / 4000)
    expected = [accuracy - 1.96 * standard_error, accuracy + 1.96 * standard_error]
    # 1000 resamples estimate a 2.5 % quantile to about 0.09 standard errors; allow three times that.
    assert result.accuracy_interval == pytest.approx(expected, abs=0.27 * standard_error)


@pytest.mark.parametrize(("right", "count"), [(2, 2), (18, 20), (0, 40), (40, 40)])
def test_accuracy_interval_of_few_images_or_without_mistakes_is_exact(right: int, count: int) -> None:
    logits = np.eye(2)[np.array([0] * right + [1] * (count - right))]
    result = score(logits, np.zeros(count, np.int64), _names(2))
    expected = binomtest(right, count).proportion_ci(0.95, "exact")
    assert result.accuracy_interval == pytest.approx((expected.low, expected.high))


def test_an_interval_of_width_zero_is_left_out_with_a_reason() -> None:
    labels = np.array([0, 1, 0, 1, 1])
    logits = np.eye(2)[labels] * np.array([[1.0], [2.0], [3.0], [4.0], [5.0]])  # no mistake, but other probabilities
    result = score(logits, labels, _names(2))
    assert result.accuracy_interval == pytest.approx((0.025 ** (1 / 5), 1.0))
    assert result.balanced_accuracy_interval is result.macro_f1_interval is None
    assert result.nll_interval[0] < result.nll_interval[1]
    (note,) = [each for each in result.notes if each.startswith("No interval")]
    assert "balanced accuracy, macro f1: every resample of these 5 images" in note
    rows = np.random.default_rng(0).integers(0, 2, (40, 3))
    labeled = multi_label.MultiLabelOutcomes(logits=8.0 * rows - 4, labels=rows.astype(float))
    several = multi_label.score(labeled, _names(3), [0.5] * 3, Bootstrap(resamples=50))
    assert several.exact_match == 1
    assert several.exact_match_interval == pytest.approx((0.025 ** (1 / 40), 1.0))
    assert several.mean_average_precision_interval is several.f1_macro_interval is None
    one = regression.RegressionOutcomes(predicted=np.ones((1, 1)), labels=np.zeros((1, 1)), scale=np.ones(1))
    alone = regression.score(one, ["age"], Bootstrap(resamples=50))
    assert alone.mae == 1
    assert alone.mae_interval is None


def test_paired_interval_is_narrower_than_that_of_either_model() -> None:
    logits, labels = _random_case(1000, 3, [0, 1, 2])
    other = logits + 0.1 * np.random.default_rng(1).normal(size=logits.shape)
    hits = read_outcomes(logits, labels).hits.astype(float)
    other_hits = read_outcomes(other, labels).hits.astype(float)
    low, high = mean_interval(hits - other_hits)
    one_low, one_high = mean_interval(hits)
    assert high - low < 0.5 * (one_high - one_low)
    assert (one_low, one_high) == score(logits, labels, _names(3)).accuracy_interval


def test_intervals_depend_on_the_seed_alone() -> None:
    logits, labels = _random_case(200, 3, [0, 1, 2])
    first, second, other = (score(logits, labels, _names(3), seed=seed) for seed in (0, 0, 1))
    assert first == second
    assert first.nll_interval != other.nll_interval
    assert first.nll == other.nll


def test_result_survives_json_unchanged() -> None:
    logits, labels = _random_case(30, 7, [0, 1, 2, 3])
    result = score(logits, labels, _names(7))
    values = result.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert Metrics.from_dict(values) == result


def test_float_types_and_tensors_score_alike() -> None:
    logits, labels = _random_case(60, 6, list(range(6)))
    logits = np.round(logits * 4) / 4  # exact in every type
    expected = score(logits, labels, _names(6))
    logits.setflags(write=False)  # as a memory-mapped store gives them
    assert score(logits.astype(np.float16), labels.astype(np.uint8), _names(6)) == expected
    for dtype in (torch.bfloat16, torch.float64):
        tensor = torch.tensor(logits, dtype=dtype, requires_grad=True)
        assert score(tensor, torch.tensor(labels), _names(6)) == expected


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1e30, 0.0], [0.0, 1e30]], dtype=np.float32)
    result = score(logits, np.array([0, 1]), ["a", "b"])
    assert (result.nll, result.ece) == (0.0, 0.0)
    assert str(result.nll) == "0.0"  # not -0.0
    assert result.nll_interval is None  # every resample gives 0.0


@pytest.mark.parametrize(
    ("logits", "labels", "names", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), "ab", "has no images to score"),
        (
            np.array([[np.nan, 0], [0, np.inf], [1, 0]]),
            np.zeros(3, int),
            "ab",
            "2 of 3 images are nan or infinite",
        ),
        (np.zeros((3, 2)), np.zeros(2, int), "ab", r"\(3, 2\).*\(2,\)"),
        (np.zeros(3), np.zeros(3, int), "ab", r"\(images, classes\)"),
        (np.zeros((2, 2)), np.array([0, 2]), "ab", "from 0 to 2 .* 0 to 1"),
        (np.zeros((2, 2)), np.array([0, -1]), "ab", "from -1 to 0"),
        (np.zeros((2, 2)), np.array([0.0, 1.0]), "ab", "float64"),
        (np.zeros((2, 2)), np.array([0, 1]), "abc", "3 label names .* 2 classes"),
    ],
)
def test_mistakes_are_named(logits: Any, labels: Any, names: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(logits, labels, list(names))


def test_a_negative_number_of_resamples_is_refused() -> None:
    with pytest.raises(ValueError, match="resamples=-1: choose 0"):
        Bootstrap(resamples=-1)


def test_the_modules_of_evaluate_compute_what_a_run_reports() -> None:
    import evaluate

    from hf_transfer.metrics import modules

    logits, labels = _random_case(200, 7, [0, 1, 2, 4, 6])
    outcomes, expected = read_outcomes(logits, labels), score(logits, labels, _names(7), resamples=0)
    used = [modules.Accuracy, modules.BalancedAccuracy, modules.MacroF1, modules.PerClass, modules.ConfusionMatrix]
    used += [modules.NegativeLogLikelihood, modules.CalibrationError, modules.TopKAccuracy]
    combined = evaluate.combine([module(keep_in_memory=True) for module in used])
    combined.add_batch(
        predictions=outcomes.predictions, references=outcomes.labels, label_ranks=outcomes.label_ranks,
        label_log_probabilities=outcomes.label_log_probabilities, confidences=outcomes.confidences, hits=outcomes.hits,
    )  # fmt: skip
    values = combined.compute(num_classes=7)
    rows = [{"label": n, **row} for n, row in zip(_names(7), values.pop("per_class"), strict=True)]
    assert rows == expected.per_class
    assert values.pop("confusion_matrix") == expected.confusion_matrix
    for name, value in values.items():
        assert value == getattr(expected, name), name


def test_modules_need_no_network_and_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import evaluate

    from hf_transfer.metrics import modules as metric_modules

    def refuse(*_: object) -> None:
        raise AssertionError("a metric opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    logits, labels = _random_case(30, 7, [0, 1])
    assert score(logits, labels, _names(7)).num_samples == 30
    assert list(tmp_path.iterdir()) == []

    # As a user of evaluate would use them: alone, batch by batch, and pickled.
    module = pickle.loads(pickle.dumps(metric_modules.MacroF1()))
    for part in np.array_split(np.arange(30), 4):
        module.add_batch(predictions=logits.argmax(axis=1)[part], references=labels[part])
    expected = score(logits, labels, _names(7), resamples=0).macro_f1
    assert module.compute() == {"macro_f1": expected}
    top3 = metric_modules.TopKAccuracy().compute(label_ranks=[0, 2, 3, 9], k=3)
    assert top3 == {"top3_accuracy": 0.5}


def test_gather_in_one_process_returns_the_rows() -> None:
    logits, _ = _random_case(5, 3, [0, 1, 2])
    for given in (logits, torch.from_numpy(logits)):
        assert np.array_equal(gather_rows(Accelerator(cpu=True), given), logits)


_WORKER = """
import sys
import numpy as np
import torch
from accelerate import Accelerator
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.store import Store
from hf_transfer.training.evaluate import compute_stored_logits
from hf_transfer.training.gather import gather_rows

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
folder, rank = sys.argv[1], accelerator.process_index
for border in (4, 7, 0):  # rows 0..border-1 on rank 0, border..6 on rank 1
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.arange(21, dtype=dtype).reshape(7, 3).requires_grad_()
        part = logits[:border] if rank == 0 else logits[border:]
        got = gather_rows(accelerator, part if len(part) else np.zeros((0, 0)))
        assert got.dtype == np.float32 and np.array_equal(got, np.arange(21).reshape(7, 3)), (border, got)
assert gather_rows(accelerator, torch.zeros(0, 3)).shape == (0, 3)
try:
    gather_rows(accelerator, np.zeros((2, 3 + rank)))
except ValueError as error:
    assert "rank 0 passes rows of 3 numbers, another rank rows of 4" in str(error), error
else:
    raise AssertionError("no error for rows of different lengths")
# Each process computes its share of the rows, in order; one row too few is an error on both.
resources, rows = Resources(accelerator=accelerator), np.arange(21, dtype=np.float32).reshape(7, 3)
for count in (7, 1, 0):
    logits = compute_stored_logits(lambda x: 2 * x, Store([rows[:count]]), resources, batch_size=3)
    assert logits.shape == (count, 3 if count else 0) and np.array_equal(logits, 2 * rows[:count].reshape(logits.shape))
try:
    compute_stored_logits(lambda x: x[:3], Store([rows]), resources)
except ValueError as error:
    assert "the network gives 6 rows for 7 images" in str(error), error
else:
    raise AssertionError("no error for a missing row")
open(f"{folder}/done-{rank}", "w").close()
accelerator.end_training()
"""


def test_gather_over_two_processes_counts_each_image_once(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = []
    for rank in range(2):
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        workers.append(
            subprocess.Popen(
                [sys.executable, "-c", _WORKER, str(tmp_path)],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()  # waits, and closes its pipe
    assert {path.name for path in tmp_path.iterdir()} == {"done-0", "done-1"}


def test_as_many_images_as_said_tell_two_models_apart_in_four_of_five_cases() -> None:
    """Simulated: two models with independent mistakes, 0.87 and 0.93, and the two-sided test at the 5 % level."""
    count = count_images_to_tell_apart(0.9, 0.06)
    generator = np.random.default_rng(0)
    hits = [generator.binomial(count, accuracy, size=4000) / count for accuracy in (0.87, 0.93)]
    error = np.sqrt(sum(share * (1 - share) for share in hits) / count)
    assert (np.abs(hits[1] - hits[0]) > 1.96 * error).mean() == pytest.approx(0.8, abs=0.03)
    assert count_images_to_tell_apart(0.9, 0.03) == pytest.approx(4 * count, abs=4)
