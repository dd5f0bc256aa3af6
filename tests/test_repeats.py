"""Folds and seeds: what each run may see, what is computed once, what is reported, and how an interrupted run continues."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from numpy.typing import NDArray
from safetensors.torch import load_file

import hf_transfer as ht
from hf_transfer import launch, repeats
from hf_transfer.config import RepeatConfig, RunConfig
from hf_transfer.data.dataset import Data
from hf_transfer.data.folds import divide
from hf_transfer.data.splits import Role, Split
from hf_transfer.metrics.bootstrap import Bootstrap
from hf_transfer.metrics.classification import read_outcomes, score
from hf_transfer.metrics.multi_label import choose_thresholds
from hf_transfer.metrics.records import Metrics, Score
from hf_transfer.prefix.cache import MissingRows
from hf_transfer.prefix.extract import _Extraction
from hf_transfer.repeats import run_config
from hf_transfer.reporting.predictions import PREDICTIONS
from hf_transfer.reporting.report_results import explain_validation
from hf_transfer.reporting.verdict import describe_kept_model
from hf_transfer.settings import replace_settings
from hf_transfer.strategy import default_config
from hf_transfer.targets.multi_label import MultiLabel
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.training.final_fit import EstimatedBy, HeldOutRun, plan_final_fit
from hf_transfer.training.records import EpochRecord, Kept, PhaseResult, RunResult
from tests.sessions import make_config, read_data
from tests.test_recipes import run_recipe

SCHEMA = json.loads((Path(ht.__file__).parent / "reporting" / "results.schema.json").read_text())
FEW = {"images_per_class": 6, "cache": "auto"}


def run(folder: Path | None, strategy: str, **settings: Any) -> tuple[RunResult, dict[str, Any]]:
    """A small run, and the content of its results.json, which fits the schema."""
    session, result = run_config(make_config(strategy, **{**FEW, **settings}), output_dir=folder)
    session.costs.stop()
    results = {} if folder is None else json.loads((folder / "results.json").read_text())
    if results:
        jsonschema.validate(results, SCHEMA)
    return result, results


def read_rows(folder: Path) -> dict[str, tuple[str, str, list[float]]]:
    """Split, label and probabilities of each image by its path."""
    table = pq.read_table(folder / PREDICTIONS).to_pylist()
    rows = {row["path"]: (row["split"], row["label"], row["probabilities"]) for row in table if row["split"] != "test"}
    assert len(rows) == sum(row["split"] != "test" for row in table), "one row for each image"
    return rows


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("folded") / "run"
    _, results = run(folder, "full", folds=3, seed=7)
    return folder, results


# Folds


def test_every_image_is_predicted_by_the_fold_that_holds_it_out(folded: tuple[Path, dict[str, Any]]) -> None:
    folder, results = folded
    rows = read_rows(folder)
    assert len(rows) == 60
    held_out: dict[str, list[float]] = {}
    for fold in (1, 2, 3):
        of_fold = read_rows(folder / f"fold_{fold}")
        assert {split for split, _, _ in of_fold.values()} == {"validation"}
        assert set(of_fold).isdisjoint(held_out)
        held_out |= {path: probabilities for path, (_, _, probabilities) in of_fold.items()}
    assert set(held_out) == set(rows)
    (temperature,) = results["details"]["confidence"]["temperatures"]  # fitted on these predictions
    assert temperature != 1
    for path, (_, _, probabilities) in rows.items():
        sharpened = np.array(held_out[path]) ** (1 / temperature)
        np.testing.assert_allclose(probabilities, sharpened / sharpened.sum(), atol=1e-6)
    names = np.array(results["label_names"])
    hits = [names[int(np.argmax(numbers))] == label for _, label, numbers in rows.values()]
    assert results["metrics"]["validation"]["accuracy"] == pytest.approx(np.mean(hits))


def test_the_section_has_mean_and_spread_of_the_folds(folded: tuple[Path, dict[str, Any]]) -> None:
    folder, results = folded
    of_folds = [json.loads((folder / f"fold_{i}" / "results.json").read_text()) for i in (1, 2, 3)]
    values = [each["metrics"]["validation"]["accuracy"] for each in of_folds]
    section = results["folds"]
    assert section["count"] == 3
    assert section["metrics"]["validation"]["accuracy"] == {
        "mean": pytest.approx(np.mean(values)), "std": pytest.approx(np.std(values, ddof=1)), "values": values
    }  # fmt: skip
    assert [each["metrics"]["validation"]["num_samples"] for each in of_folds] == [20, 20, 20]
    assert all("test" not in each["metrics"] for each in of_folds), "test images are for the model alone"
    assert results["metrics"]["validation"]["estimated_by"] == "folds"
    assert results["metrics"]["validation"]["num_samples"] == 60
    assert "estimated_by" not in results["metrics"]["test"]


def test_the_model_trains_on_all_images_as_long_as_the_median_fold(folded: tuple[Path, dict[str, Any]]) -> None:
    folder, results = folded
    kept = [
        json.loads((folder / f"fold_{i}" / "results.json").read_text())["plan"][-1]["kept_epoch"] for i in (1, 2, 3)
    ]
    assert results["plan"][-1]["kept_epoch"] == sorted(kept)[1]
    history = results["details"]["phases"][-1]["history"]
    assert [epoch["images"] for epoch in history] == [60] * len(history)
    assert len(history) == sorted(kept)[1]
    for report in (folder / "report.html", folder / "model" / "README.md"):
        assert "3 folds: accuracy" in report.read_text()


def test_folds_read_one_pass_over_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))
    computed: list[int] = []
    fill = _Extraction.fill

    def count(extraction: _Extraction, missing: MissingRows) -> None:
        computed.append(len(missing.rows))
        fill(extraction, missing)

    monkeypatch.setattr(_Extraction, "fill", count)
    run(None, "linear_probe", folds=4)
    num_test = len(read_data(make_config(**FEW).data).test or ())
    assert computed == [60, num_test]


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_without_a_cache_on_disk_folds_give_the_same(cache: str, tmp_path: Path) -> None:
    stored, _ = run(None, "linear_probe", folds=2)
    again, _ = run(None, "linear_probe", folds=2, cache=cache)
    np.testing.assert_allclose(stored.logits["train"], again.logits["train"], atol=1e-2)


def test_the_probe_of_a_fold_does_not_see_the_fold(tmp_path: Path) -> None:
    """The labels of held-out images change neither the head of their fold nor its C."""
    config = make_config("linear_probe", **FEW)
    data = read_data(config.data)
    fold = divide(data, 3, 0).hold_out(0)
    validation = fold.validation.select(np.arange(len(fold.validation)))
    object.__setattr__(validation, "labels", (validation.labels + 1) % 10)
    heads = []
    for changed in (fold, repeats.replace(fold, validation=validation)):
        start = repeats._Start(config=config, load=lambda own: data, output_dir=None, unrepeatable=())
        session = start.open(changed, "fold_1")
        result = repeats.train_session(session)
        heads.append((result.phases[0].regularization_c, result.backbone.model.get_classifier().weight))
    assert heads[0][0] == heads[1][0]
    assert torch.equal(heads[0][1], heads[1][1])


def test_the_final_probe_is_the_probe_of_all_images(tmp_path: Path) -> None:
    """A probe without folds is fitted on train and validation images too. The temperatures are of other held-out fits."""
    run(tmp_path / "folds", "linear_probe", folds=3, calibrate=False)
    run(tmp_path / "once", "linear_probe", calibrate=False)
    folds, once = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("folds", "once"))
    for name in once:
        torch.testing.assert_close(folds[name], once[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("probe_then_full", {"wise_ft": True}),
        pytest.param("greedy_stack", {"stage_epochs": 1, "layers": 2, "patience_layers": 1}, marks=pytest.mark.soak),
        pytest.param("lora", {"class_balance": "sampler"}, marks=pytest.mark.soak),
        pytest.param("gradual", {}, marks=pytest.mark.soak),
        pytest.param("last_layers", {"cache_views": 2}, marks=pytest.mark.soak),
    ],
)
def test_every_strategy_runs_in_folds(strategy: str, settings: dict[str, Any], tmp_path: Path) -> None:
    _, results = run(tmp_path / "run", strategy, folds=2, epochs=2, **settings)
    assert results["metrics"]["validation"]["num_samples"] == 60
    assert results["metrics"]["test"]["num_samples"] > 60


def test_an_interrupted_run_continues_with_the_finished_folds(
    folded: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected = folded
    folder, execute, runs = tmp_path / "run", repeats.train_session, []

    def stop_in_the_third(session: Any, *rest: Any) -> RunResult:
        runs.append(session.output_dir.name)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return execute(session, *rest)

    monkeypatch.setattr(repeats, "train_session", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(folder, "full", folds=3, seed=7)
    assert not (folder / "results.json").exists()
    _, results = run(folder, "full", folds=3, seed=7, resume=True)
    assert runs == ["fold_1", "fold_2", "fold_3", "fold_3", "run"]
    assert results["metrics"] == expected["metrics"]
    assert results["folds"]["metrics"] == expected["folds"]["metrics"]
    weights = [load_file(each / "model" / "model.safetensors") for each in (whole, folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    (folder / "results.json").unlink()
    with pytest.raises(ValueError, match=r"the run in .*fold_1 had other settings: --lr was 0.0002, is 0.1\."):
        run(folder, "full", folds=3, seed=7, resume=True, lr=0.1)


@pytest.mark.soak
def test_the_doors_give_the_same_folds(tmp_path: Path) -> None:
    """Command in two processes, configuration and Python."""
    flags = {"images_per_class": 6, "folds": 2, "readouts": "none"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    env = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run_recipe("linear_probe", *words, "--output_dir", str(tmp_path / "two"), launcher=launcher, env=env)
    config = replace_settings(default_config("linear_probe"), {**flags, "output_dir": str(tmp_path / "one")})
    launch.run(config)
    own = {name: value for name, value in flags.items() if name != "readouts"}
    python = ht.Task("sklearn/digits", **own).fit(ht.linear_probe(readouts="none"))
    assert python.folder is None
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[0]["metrics"] == python.results["metrics"]
    assert results[0]["folds"]["metrics"] == python.results["folds"]["metrics"]
    one, two = (each["metrics"]["validation"] for each in results)
    assert two["num_samples"] == one["num_samples"] == 60
    assert two["nll"] == pytest.approx(one["nll"], rel=1e-2)
    saved = load_file(tmp_path / "one" / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in python.model.state_dict().items())


def read_labels(config: RunConfig) -> Data:
    """Digits with two labels each: whether they are even, and whether they are large."""
    data, target = read_data(config.data), MultiLabel(names=("even", "large"))

    def label(split: Split) -> Split:
        labels = np.stack([split.labels % 2 == 0, split.labels >= 5], 1).astype(np.float32)
        return repeats.replace(split, labels=labels, target=target)

    assert data.test is not None
    return repeats.replace(data, train=label(data.train), validation=label(data.validation), test=label(data.test))


def test_thresholds_of_folds_are_fitted_to_all_predictions_of_the_folds() -> None:
    config = make_config("linear_probe", **FEW, folds=2, readouts="none")
    session, result = run_config(config, load=read_labels)
    session.costs.stop()
    logits = np.concatenate([result.logits["train"], result.logits["validation"]])
    labels = np.concatenate([session.data.train.labels, session.data.validation.labels])
    validation = result.metrics["validation"]
    assert validation.num_samples == len(labels)
    assert validation.estimated_by == "folds"
    expected = choose_thresholds(logits.astype(np.float64), labels.astype(np.float64))
    assert [row["threshold"] for row in validation.per_class] == list(expected)


# The data of folds


class _Source:
    """Names and fingerprints of images that need not exist."""

    is_stream = False

    def __init__(self, folder: str, count: int) -> None:
        self._folder, self._count = folder, count

    def __len__(self) -> int:
        return self._count

    def name(self, row: int) -> str:
        return f"{self._folder}/{row}.jpg"

    def digests(self, rows: NDArray[np.int64], manifests: Path | None = None) -> NDArray[np.uint8]:
        """Returns hashes that begin with the row."""
        hashes = (bytes([row]) + xxhash.xxh3_128_digest(self.name(row).encode())[1:] for row in rows.tolist())
        return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16)


def make_split(name: Role, count: int, groups: list[str] | None = None) -> Split:
    return Split(
        name=name,
        source=_Source(name, count),  # type: ignore[arg-type]
        rows=np.arange(count),
        labels=np.arange(count) % 2,
        target=SingleLabel(names=("ant", "bee")),
        groups=None if groups is None else np.array(groups),
    )


def test_a_stored_validation_split_joins_the_folds() -> None:
    data = repeats.replace(
        read_data(make_config(**FEW).data), train=make_split("train", 10), validation=make_split("validation", 6)
    )
    folds = divide(data, 4, seed=0)
    names = []
    for fold in range(4):
        held_out, train = folds.hold_out(fold).validation, folds.hold_out(fold).train
        assert len(held_out) == 4
        assert held_out.counts().tolist() == [2, 2]
        names += [held_out.image_name(i) for i in range(4)]
        own = set(names[-4:])
        assert own.isdisjoint(train.image_name(i) for i in range(len(train)))
    assert sorted(names) == sorted([f"train/{i}.jpg" for i in range(10)] + [f"validation/{i}.jpg" for i in range(6)])
    np.testing.assert_array_equal(folds.pool.digests()[:, 0], [*range(10), *range(6)])


def test_folds_keep_groups_together() -> None:
    groups = [f"g{i // 4}" for i in range(40)]
    data = repeats.replace(
        read_data(make_config(**FEW).data),
        train=make_split("train", 40, groups),
        validation=make_split("validation", 4, ["g0"] * 4),
    )
    folds = divide(data, 5, seed=1)
    for group in set(groups):
        assert len(set(folds.fold_of[folds.pool.groups == group])) == 1


def test_a_class_of_one_group_is_refused() -> None:
    groups = [("a" if i % 2 else f"b{i}") for i in range(20)]
    data = repeats.replace(
        read_data(make_config(**FEW).data),
        train=make_split("train", 20, groups),
        validation=make_split("validation", 2),
    )
    object.__setattr__(data.validation, "labels", np.zeros(2, np.int64))
    with pytest.raises(ValueError, match=r"folds=2: the classes 'bee' have one image or one group"):
        divide(data, 2, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folds": 1}, "folds=1: choose 2 or more"),
        ({"folds": 3, "seeds": 2}, "omit --folds or --seeds"),
        ({"folds": 3, "train_on_all": True}, "trains on all images anyway.*omit --train_on_all"),
        ({"seeds": 3, "train_on_all": True}, "omit --train_on_all"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RepeatConfig(**settings)


def test_a_last_seed_that_is_too_high_is_refused_before_the_first_run() -> None:
    with pytest.raises(ValueError, match=r"the last seed would be 4294967296, but .* choose a lower --seed"):
        make_config(seed=2**32 - 1, seeds=2)
    assert make_config(seed=2**32 - 2, seeds=2).seed == 2**32 - 2


def test_the_old_name_of_the_probes_folds_leads_to_the_new_one() -> None:
    with pytest.raises(ValueError, match=r"unknown setting 'folds'; did you mean cv_folds\?"):
        ht.linear_probe(folds=3)


def make_phase(kept: Kept, epoch: int | None, accuracies: list[float]) -> PhaseResult:
    records = tuple(
        EpochRecord(
            epoch=i + 1, train_loss=1.0, train_accuracy=1.0, validation=Score(quality=a, loss=0.0), images=1,
            images_per_second=1.0,
        )
        for i, a in enumerate(accuracies)
    )  # fmt: skip
    score_kept = Score(quality=0.5, loss=0.0)
    return PhaseResult(
        policy="full", cut=None, optimizer="adamw", epochs=9, num_trainable=1, kept=kept, kept_epoch=epoch,
        score=score_kept, history=records,
    )  # fmt: skip


def test_the_final_fit_is_as_long_as_the_median_of_the_folds() -> None:
    metrics = score(read_outcomes(np.eye(2), np.array([0, 1])), ("a", "b"), Bootstrap(resamples=0))
    tuned = [make_phase(Kept.EPOCH, epoch, [0.1 * i for i in range(1, epoch + 1)]) for epoch in (2, 4, 5)]
    runs = [HeldOutRun(phases=(make_phase(Kept.START, None, [0.1]), phase)) for phase in tuned]
    final = plan_final_fit(runs, metrics, {}, estimated_by=EstimatedBy.FOLDS)
    assert [length.epochs for length in final.phases] == [0, 4]
    assert [s.quality for s in final.phases[1].scores] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert final.metrics.estimated_by == "folds"


def test_the_final_fit_of_a_stack_has_the_median_depth() -> None:
    metrics = score(read_outcomes(np.eye(2), np.array([0, 1])), ("a", "b"), Bootstrap(resamples=0))
    phases = [make_phase(Kept.EPOCH, epoch, [0.5] * epoch) for epoch in (1, 2, 3, 4)]
    runs = [
        HeldOutRun(phases=(*phases[:stages], phases[3]), num_stages=stages, depth=depth)
        for stages, depth in ((3, 2), (2, 1), (3, 3))
    ]
    final = plan_final_fit(runs, metrics, {}, estimated_by=EstimatedBy.FOLDS)
    assert [length.epochs for length in final.stages] == [1, 2]
    assert [length.epochs for length in final.phases] == [4]


# A sibling


@pytest.fixture(scope="module")
def with_sibling(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("with_sibling") / "run"
    _, results = run(folder, "full", train_on_all=True, epochs=3, keep_last_epoch=True)
    return folder, results


def test_the_sibling_is_an_ordinary_run_whose_metrics_the_model_has(
    with_sibling: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, results = with_sibling
    sibling = json.loads((folder / "sibling" / "results.json").read_text())
    _, calibrated = run(tmp_path / "calibrated", "full", epochs=3, keep_last_epoch=True)
    assert (
        calibrated["details"]["confidence"]["temperatures"] == results["details"]["confidence"]["temperatures"] != [1.0]
    )
    assert calibrated["metrics"]["validation"]["nll"] == pytest.approx(results["metrics"]["validation"]["nll"])
    _, alone = run(tmp_path / "alone", "full", epochs=3, keep_last_epoch=True, calibrate=False)
    assert sibling["metrics"]["validation"] == alone["metrics"]["validation"]
    assert "test" not in sibling["metrics"], "test images are for the model alone"
    one, other = (load_file(each / "model" / "model.safetensors") for each in (folder / "sibling", tmp_path / "alone"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results["metrics"]["validation"]["accuracy"] == alone["metrics"]["validation"]["accuracy"]
    assert results["metrics"]["validation"]["estimated_by"] == "sibling"
    assert results["metrics"]["test"]["num_samples"] > 60
    assert {split for split, _, _ in read_rows(folder).values()} == {"validation"}
    for report in (folder / "report.html", folder / "model" / "README.md"):
        assert "each image was predicted by a model of the same recipe that had not trained on it" in report.read_text()


def test_runs_of_other_weights_are_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "run", "linear_probe", folds=2, readouts="none")
    run(tmp_path / "run", "linear_probe", folds=2, readouts="none", resume=True, overwrite_output_dir=True)
    monkeypatch.setattr(repeats, "hash_tensors", lambda tensors: "of another checkpoint")
    with pytest.raises(ValueError, match="started from other weights than this checkpoint has now"):
        run(tmp_path / "run", "linear_probe", folds=2, readouts="none", resume=True, overwrite_output_dir=True)


@pytest.mark.parametrize(("kept", "is_said"), [(Kept.EPOCH, True), (Kept.LAST, False)])
def test_metrics_say_whether_the_held_out_images_chose_epochs(kept: Kept, is_said: bool) -> None:
    score = Score(quality=0.5, loss=1.0)
    phase = PhaseResult(
        policy="full", cut=None, optimizer="adamw", epochs=1, num_trainable=1, kept=kept, score=score, kept_epoch=1
    )
    metrics = Metrics(values={}, num_samples=2, score=score)
    final = plan_final_fit([HeldOutRun(phases=(phase,))], metrics, {}, estimated_by=EstimatedBy.SIBLING)
    sentence = explain_validation({}, final.metrics.details)
    assert ("also chose the epochs of those models, so the metrics are optimistic" in sentence) == is_said


def test_the_model_trains_on_train_and_validation_images(with_sibling: tuple[Path, dict[str, Any]]) -> None:
    folder, results = with_sibling
    sibling = json.loads((folder / "sibling" / "results.json").read_text())
    histories = [each["details"]["phases"][-1]["history"] for each in (sibling, results)]
    assert [[epoch["images"] for epoch in history] for history in histories] == [[50] * 3, [60] * 3]
    assert [each["plan"][-1]["kept"] for each in (sibling, results)] == ["last", "last"]
    assert "the last one that it trained" in results["plan"][-1]["description"]


def test_a_fixed_length_makes_the_model_of_folds_the_model_with_a_sibling(
    with_sibling: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Up to the temperature, which the folds fit on more predictions than the sibling."""
    folder, results = with_sibling
    _, of_folds = run(tmp_path / "folds", "full", folds=2, epochs=3, keep_last_epoch=True)
    one, other = (load_file(each / "model" / "model.safetensors") for each in (folder, tmp_path / "folds"))
    by_sibling, by_folds = (each["details"]["confidence"]["temperatures"][0] for each in (results, of_folds))
    assert by_sibling != by_folds
    for name in one:
        if name.startswith("fc."):
            torch.testing.assert_close(one[name] * by_sibling, other[name] * by_folds, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(one[name], other[name])


def test_a_probe_that_the_sibling_kept_is_not_trained_again(tmp_path: Path) -> None:
    _, results = run(tmp_path / "run", "probe_then_full", train_on_all=True, lr=1e-9, epochs=1, calibrate=False)
    _, alone = run(tmp_path / "alone", "probe_then_full", lr=1e-9, epochs=1, calibrate=False)
    assert results["details"]["kept_probe"]
    assert results["details"]["phases"][-1]["history"] == []
    one, other = (load_file(tmp_path / each / "model" / "model.safetensors") for each in ("run", "alone"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-3, rtol=1e-3)
    assert results["metrics"]["validation"]["accuracy"] == alone["metrics"]["validation"]["accuracy"]
    kept = "Kept: the linear probe, fitted on all 60 train and validation images, because no epoch was better beyond chance in"
    assert describe_kept_model(results) == f"{kept} its sibling."
    assert describe_kept_model({**results, "folds": {}}) == f"{kept} at least half of the folds."
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert kept in card
    assert "10 train images are drawn as validation (stratified, seed 0), and the train split keeps 50." in card
    assert "The model is trained on all 60 train and validation images." in card
    assert re.search(r"Cost: \S+ s before saving and the report \(and \S+ s in the sibling before\)[,;]", card)


def test_an_interrupted_run_keeps_the_finished_sibling(
    with_sibling: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected = with_sibling
    folder, execute, runs = tmp_path / "run", repeats.train_session, []

    def stop_in_the_second(session: Any, *rest: Any) -> RunResult:
        runs.append(session.output_dir.name)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return execute(session, *rest)

    monkeypatch.setattr(repeats, "train_session", stop_in_the_second)
    settings = {"train_on_all": True, "epochs": 3, "keep_last_epoch": True}
    with pytest.raises(KeyboardInterrupt):
        run(folder, "full", **settings)
    _, results = run(folder, "full", **settings, resume=True)
    assert runs == ["sibling", "run", "run"]
    assert results["metrics"] == expected["metrics"]
    weights = [load_file(each / "model" / "model.safetensors") for each in (whole, folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_doors_give_the_same_model_with_a_sibling(
    with_sibling: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Recipe and Python, against the configuration."""
    folder, _ = with_sibling
    flags = {"images_per_class": 6, "epochs": 3, "batch_size": 16}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run_recipe("full", *words, "--train_on_all", "--keep_last_epoch", "--output_dir", str(tmp_path / "recipe"))
    task = ht.Task("sklearn/digits", images_per_class=6, batch_size=16, train_on_all=True)
    python = task.fit(ht.full(epochs=3, keep_last_epoch=True, tracker="none"))
    saved, recipe = (load_file(each / "model" / "model.safetensors") for each in (folder, tmp_path / "recipe"))
    assert all(torch.equal(saved[name], recipe[name]) for name in saved)
    assert all(torch.equal(saved[name], value) for name, value in python.model.state_dict().items())


def test_thresholds_with_a_sibling_are_fitted_to_its_predictions() -> None:
    session, result = run_config(make_config("full", **FEW, train_on_all=True, epochs=1), load=read_labels)
    session.costs.stop()
    logits, labels = result.logits["validation"], session.data.validation.labels
    validation = result.metrics["validation"]
    assert set(result.logits) == {"validation", "test"}
    assert validation.num_samples == len(labels)
    assert validation.estimated_by == "sibling"
    expected = choose_thresholds(logits.astype(np.float64), labels.astype(np.float64))
    assert [row["threshold"] for row in validation.per_class] == list(expected)


# Seeds


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("seeded") / "run"
    _, results = run(folder, "full", seeds=2, seed=4)
    return folder, results


def test_each_seed_is_a_run_with_that_seed(seeded: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = seeded
    run(tmp_path / "alone", "full", seed=5)
    one, alone, first, model = (
        load_file(each / "model" / "model.safetensors")
        for each in (folder / "seed_5", tmp_path / "alone", folder / "seed_4", folder)
    )
    assert all(torch.equal(one[name], alone[name]) for name in one)
    assert all(torch.equal(first[name], model[name]) for name in first), "the model is the first seed's"
    assert any(not torch.equal(one[name], first[name]) for name in one)


def test_the_gain_over_the_probe_is_paired(seeded: tuple[Path, dict[str, Any]]) -> None:
    folder, results = seeded
    names = np.array(results["label_names"])

    def hits(run_folder: Path) -> NDArray[np.float64]:
        rows = [row for row in pq.read_table(run_folder / PREDICTIONS).to_pylist() if row["split"] == "test"]
        return np.array([float(names[int(np.argmax(r["probabilities"]))] == r["label"]) for r in rows])

    gains = [hits(folder / f"seed_{seed}") - hits(folder / f"seed_{seed}" / "probe") for seed in (4, 5)]
    gain = results["seeds"]["gain_over_probe"]
    assert gain["values"] == pytest.approx([each.mean() for each in gains])
    assert gain["mean"] == pytest.approx(np.mean(gains))
    low, high = gain["interval"]
    spread = np.mean(gains, axis=0).std() / len(gains[0]) ** 0.5
    assert low < gain["mean"] < high
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.15), "the interval over images"
    values = results["seeds"]["metrics"]["test"]["accuracy"]
    assert values["mean"] == pytest.approx(np.mean(values["values"]))
    assert "2 seeds, gain over a linear probe in test accuracy" in (folder / "report.html").read_text()


def test_finished_seeds_are_kept(
    seeded: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = seeded
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / "results.json").unlink()
    shutil.rmtree(copy / "seed_5" / "probe")
    runs, execute = [], repeats.train_session

    def record(session: Any, *rest: Any) -> RunResult:
        runs.append(str(session.output_dir.relative_to(copy)))
        return execute(session, *rest)

    monkeypatch.setattr(repeats, "train_session", record)
    _, results = run(copy, "full", seeds=2, seed=4, resume=True)
    assert runs == ["seed_4", "seed_5/probe"], "the first seed continues from its last state"
    assert results["seeds"]["metrics"] == expected["seeds"]["metrics"]
    assert results["seeds"]["gain_over_probe"] == expected["seeds"]["gain_over_probe"]


def test_seeds_that_share_stored_validation_images_count_each_image_once() -> None:
    """Eight images, of which each seed predicts the same four better than the probe."""
    alone, together = (make_split("validation", 8, groups) for groups in (None, ["camera"] * 8))
    better, worse = np.eye(2, dtype=np.float32)[alone.labels], np.eye(2, dtype=np.float32)[1 - alone.labels]
    mixed = np.where(np.arange(8)[:, None] < 4, worse, better)

    def compare(names: list[str], split: Split = alone, *, shares_images: bool = False) -> dict[str, Any]:
        """The comparison of one run for each name of validation images, which may be the same images under two names."""

        def record(name: str, logits: NDArray[np.float32]) -> repeats.Repeat:
            results = {"data": {"fingerprint": {"validation": name}}}
            source = _Source("shared" if shares_images else name, 8)
            own = dataclasses.replace(split, source=source)  # type: ignore[arg-type]
            return repeats.Repeat(results=results, splits={"validation": own}, logits={"validation": logits})

        runs, probes = ([record(name, logits) for name in names] for logits in (better, mixed))
        return dict(repeats._compare(runs, probes, seed=0)["gain_over_probe"])

    one = compare(["a"])
    assert one["metric"] == "accuracy"
    assert compare(["a"] * 16)["interval"] == one["interval"]
    drawn = compare([f"drawn by seed {i}" for i in range(16)])
    assert np.diff(drawn["interval"]) < 0.5 * np.diff(one["interval"])
    both = compare(["seed 0", "seed 1"], shares_images=True)
    assert np.diff(both["interval"]) > 0.7 * np.diff(one["interval"]), (
        "the same images, drawn twice, are no further ones"
    )
    assert compare(["a"], together)["interval"] is None


def test_a_probe_is_not_compared_with_itself() -> None:
    result, _ = run(None, "linear_probe", seeds=2)
    assert set(result.repeats["seeds"]) == {"seeds", "metrics", "seconds"}
