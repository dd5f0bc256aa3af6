"""Exported = trained: ONNX and OpenVINO compute the network's logits and Pillow's pixels, in their own runtimes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import hf_transfer as ht
from hf_transfer.cli import main
from hf_transfer.config import AdapterConfig
from hf_transfer.exporting import fresh_runtime
from hf_transfer.exporting.export import export
from hf_transfer.exporting.formats import WITH_PREPROCESSING, ExportOptions, name_file
from hf_transfer.exporting.geometry import LEVELS
from hf_transfer.exporting.graph import build_activation
from hf_transfer.exporting.preprocessing_graph import build_preprocessing
from hf_transfer.exporting.records import read_records
from hf_transfer.exporting.runtime import ExportedNetwork, load_exported
from hf_transfer.exporting.verify import ExportError, Reference, make_reference, verify_export
from hf_transfer.hub.exports import export_saved
from hf_transfer.hub.verify import find_libraries, verify
from hf_transfer.network.adapters import add_adapters, merge_adapters
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.preprocessing import load_preprocessing
from hf_transfer.strategies.greedy_stack import GreedyStackStrategy
from hf_transfer.targets.multi_label import MultiLabel
from hf_transfer.targets.regression import Regression
from tests.families import make_pixels
from tests.sessions import make_session
from tests.test_add_classes import write_digits
from tests.test_publish import make_run
from tests.test_save import LABELS, write_upstream

FORMATS = ("onnx", "openvino")
TOLERANCE = 1e-4  # relative to the largest logit, or to 1 if that is more: other kernels, float32


def make_backbone(name: str, folder: Path) -> Backbone:
    """Returns a network of one of the kinds that a run ends with."""
    family = {"multi-label": "ViT", "regression": "timm ResNet", "merged LoRA": "timm ViT"}.get(name, name)
    if name == "greedy stack":
        session = make_session("greedy_stack", layers=2, stage_epochs=1)
        assert isinstance(session.strategy, GreedyStackStrategy)
        return session.strategy.make_stack(session).finished(fine_tuned=True)
    write_upstream(family, folder)
    target = {
        "multi-label": MultiLabel(names=LABELS),
        "regression": Regression(names=("age", "angle"), center=(3.0, 1.0), scale=(2.0, 0.5)),
    }.get(name, LABELS)
    backbone = load(str(folder), target, base_model="someone/upstream")
    if name == "merged LoRA":
        adapted, _ = add_adapters(backbone, backbone.chain(), AdapterConfig())
        with torch.no_grad():
            for parameter_name, parameter in adapted.model.named_parameters():
                if parameter_name in adapted.trained:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        return merge_adapters(adapted)
    return backbone


KINDS = (
    "timm MobileNetV2", "timm ViT", "timm EfficientNet", "ViT", "Swin", "greedy stack", "merged LoRA", "multi-label",
    "regression",
)  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_exported_networks_compute_the_trained_logits(name: str, tmp_path: Path) -> None:
    backbone = make_backbone(name, tmp_path / "upstream")
    reference = make_reference(backbone)
    for each in FORMATS:
        # `export` raises ExportError beyond the tolerance; the batches here have other sizes than those in the fresh process.
        (record,) = export(backbone, tmp_path / "export", ExportOptions(format=each), reference=reference)
        assert record.logits <= TOLERANCE
        network = ExportedNetwork(tmp_path / "export" / name_file(each, "fp32"), each)
        for batch in (1, 5):
            pixels = make_pixels(backbone.preprocessing.image_shape, batch)
            with torch.no_grad():
                expected = backbone.model.eval()(pixels)
            expected = getattr(expected, "logits", expected)
            scale = max(1.0, float(expected.abs().max()))
            assert float((network(pixels) - expected).abs().max()) <= TOLERANCE * scale
    again = load_exported(tmp_path / "export", "onnx")  # the folder has no weights
    assert again.target == backbone.target
    image = Image.fromarray(reference.images[0])
    assert np.array_equal(again.preprocessing.pixels(image), backbone.preprocessing.pixels(image))


def test_a_network_that_cannot_be_traced_is_refused_with_the_cause_in_plain_text() -> None:
    target: Any = SimpleNamespace(num_outputs=3, outputs_name="x", activate=lambda y: y if y.sum() > 0 else -y)
    with pytest.raises(ValueError, match=r"torch\.onnx cannot export this network \(Could not guard") as refused:
        build_activation(target)
    assert str(refused.value).isprintable()


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    backbone = load("embedded")
    export(backbone, tmp_path, ExportOptions())
    before = (tmp_path / "onnx/model.onnx").read_bytes()
    with torch.no_grad():
        next(m for m in backbone.model.modules() if isinstance(m, torch.nn.Linear)).bias += 1e-2
    reference = make_reference(backbone)
    with pytest.raises(
        ExportError, match=r"model\.onnx computes other outputs than the trained network in onnxruntime"
    ):
        verify_export(tmp_path / "onnx/model.onnx", backbone, reference, "fp32", 1)
    large = Reference(images=reference.images, inputs=reference.inputs, logits=3 * reference.logits)
    with pytest.raises(ExportError, match="computes other outputs"):  # by two thirds of the largest logit
        verify_export(tmp_path / "onnx/model.onnx", backbone, large, "int8", 1)
    moved = Reference(images=reference.images, inputs=reference.inputs, logits=reference.logits + 1)
    with pytest.raises(ExportError, match="export the model again"):
        export(backbone, tmp_path, ExportOptions(), reference=moved)
    assert (tmp_path / "onnx/model.onnx").read_bytes() == before  # the older file stays
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "export.json",
        "onnx",
        "preprocessor_config.json",
    ]


SIZES_PX = (
    (40, 40), (41, 57), (300, 200), (200, 301), (640, 90), (52, 433), (33, 900), (1200, 35), (777, 1333), (4000, 41),
    (40, 4000), (1, 40), (60, 1),
)  # fmt: skip


@pytest.mark.parametrize("name", ["embedded", "timm ViT", "ViT", "gray"])
def test_pixels_in_the_graph_are_those_of_the_preprocessing(name: str, tmp_path: Path) -> None:
    """Sizes that are enlarged, reduced, and reduced by different factors, for which Pillow 13 resizes rows first."""
    import onnxruntime

    from hf_transfer.network.source import find_source

    if name not in ("embedded", "gray"):
        write_upstream(name, tmp_path)
    folder = find_source("embedded").folder if name in ("embedded", "gray") else tmp_path
    if name == "gray":
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        config["pretrained_cfg"] |= {"input_size": [1, 32, 32], "mean": [0.45], "std": [0.22]}
        config["model_args"] = {**config.get("model_args", {}), "in_chans": 1}
        (tmp_path / "config.json").write_text(json.dumps(config))
        folder = tmp_path
    preprocessing = load_preprocessing(folder)
    assert preprocessing.colors is not None
    model = build_preprocessing(preprocessing)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for width, height in SIZES_PX:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        expected = preprocessing.normalize(torch.from_numpy(preprocessing.pixels(image).copy())[None]).numpy()
        (result,) = session.run(None, {"image": pixels})
        levels = (
            np.abs(result - expected) * np.array(preprocessing.colors.std)[:, None, None] / preprocessing.colors.rescale
        )
        assert levels.max() <= LEVELS + 1e-3, (width, height)


def test_a_graph_takes_whole_images_and_gives_probabilities(tmp_path: Path) -> None:
    import onnxruntime

    backbone = load("embedded")
    _, record = export(backbone, tmp_path, ExportOptions(with_preprocessing=True))
    assert record.pixels is not None
    session = onnxruntime.InferenceSession(str(tmp_path / WITH_PREPROCESSING), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["probabilities", "pixel_values"]
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["labels"]) == list(backbone.label_names)
    assert str(tmp_path) not in json.dumps(dict(metadata))
    reference = make_reference(backbone)
    for image, logits in zip(reference.images, reference.logits, strict=True):
        probabilities, _ = session.run(None, {"image": image})
        assert probabilities[0] == pytest.approx(torch.from_numpy(logits).softmax(0).numpy(), abs=1e-3)


def test_preprocessing_that_no_rule_computes_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    preprocessing = load("embedded").preprocessing
    turned = replace(preprocessing, resize=lambda image: preprocessing.resize(image)[::-1])
    with pytest.raises(ValueError, match="resizes in a way that the graph does not know"):
        build_preprocessing(turned)


def test_the_fresh_process_imports_neither_torch_nor_this_package() -> None:
    code = "import runpy, sys; runpy.run_path(sys.orig_argv[-1], run_name='script'); print('torch' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-P", "-c", code, fresh_runtime.__file__],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert shown.stdout.strip() == "False"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a timm network, whose card, model and reference are on disk."""
    folder = tmp_path_factory.mktemp("exported")
    write_upstream("timm ResNet", folder / "upstream")
    return make_run(load(str(folder / "upstream"), LABELS, base_model="someone/upstream"), folder / "run")


def test_a_run_is_exported_beside_its_weights_and_the_weights_load_as_before(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the second export replaces the first
        main(["export", str(run), "--format", "onnx"])
    assert capsys.readouterr().out.startswith(f"{run / 'model/onnx/model.onnx'}: ")
    main(["export", str(run / "model"), "--format", "openvino"])
    assert [record.file for record in read_records(run / "model")] == ["onnx/model.onnx", "openvino/model.xml"]
    card = (run / "model/README.md").read_text()
    assert card.count("## Exported files") == 1
    assert card.count("| `onnx/model.onnx` |") == card.count("| `openvino/model.xml` |") == 1
    assert "trained and exported |" not in card, "nothing was scored"
    assert card.index("## Exported files") < card.index("## Limits")
    settings = json.loads((run / "model/preprocessor_config.json").read_text())
    assert settings["crop_size"] == {"height": 32, "width": 32}
    graph = (run / "model/onnx/model.onnx").read_bytes()
    for path in (Path(ht.__file__).parent, sys.prefix, "site-packages"):
        assert str(path).encode() not in graph, "a published file says nothing about the machine"
    # transformers and timm still compute the trained network's logits from the trained network's pixels.
    assert len(verify(run / "model", run / "reference.safetensors", find_libraries(run / "model"))) == 2


def test_images_that_the_model_may_have_trained_on_give_no_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_digits(tmp_path / "data", range(3), test=False)
    run = tmp_path / "run"
    ht.Task(str(data), "embedded").fit(ht.linear_probe(readouts="none"), output_dir=run)
    for split, more in (("validation", []), ("train", ["--dataset", str(data)])):
        capsys.readouterr()
        main(["export", str(run), "--format", "onnx", "--export_precision", "fp16", *more])
        (record,) = read_records(run / "model")
        assert record.accuracy is not None
        assert (record.accuracy.split, record.accuracy.before, record.accuracy.after) == (split, None, None)
        assert record.accuracy.agreement > 0.9
        text = f"{split} images (the model may have trained on them, so no accuracy is given)"
        assert text in capsys.readouterr().out
        assert text in (run / "model/README.md").read_text()
    ht.Task(str(data), "embedded").fit(ht.full(epochs=1), output_dir=tmp_path / "full")
    main(["export", str(tmp_path / "full"), "--format", "onnx", "--export_precision", "fp16"])
    (record,) = read_records(tmp_path / "full/model")
    assert record.accuracy is not None
    measured = json.loads((tmp_path / "full/results.json").read_text())["metrics"]["validation"]["accuracy"]
    assert record.accuracy.before == pytest.approx(measured), (
        "it selected an epoch by these images, and trained on others"
    )


def test_an_exported_file_of_numbers_says_how_much_they_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two numbers, one in units a thousand times as small."""
    images, digits = load_digits(return_X_y=True)
    rows = ["path,small,large"]
    for i in range(60):
        Image.fromarray(np.uint8(images[i].reshape(8, 8) * 15)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{digits[i]},{1000 * digits[i]}")
    (tmp_path / "numbers.csv").write_text("\n".join(rows))
    columns: Any = {"label_columns": ("small", "large"), "problem_type": "regression"}
    task = ht.Task(str(tmp_path / "numbers.csv"), **columns)
    task.fit(ht.linear_probe(readouts="none"), output_dir=tmp_path / "run")
    main(["export", str(tmp_path / "run"), "--format", "onnx", "--export_precision", "fp16"])
    (record,) = read_records(tmp_path / "run/model")
    assert record.accuracy is not None
    assert record.accuracy.agreement is None
    small, large = record.accuracy.differences or ()
    assert 0 < small < 0.1
    assert large == pytest.approx(1000 * small, rel=0.9)
    text = f"the numbers differ by {small:.3g}, {large:.3g} on average, of "
    assert text in capsys.readouterr().out
    assert text in (tmp_path / "run/model/README.md").read_text()


def test_a_second_model_leaves_nothing_of_the_first_in_the_folder(run: Path, tmp_path: Path) -> None:
    write_upstream("timm ViT", tmp_path / "upstream")
    other = make_run(load(str(tmp_path / "upstream"), ("x", "y"), base_model="someone/other"), tmp_path / "other")
    config = json.loads((other / "model/config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (other / "model/config.json").write_text(json.dumps(config))
    for source in (run, other):
        export_saved(source, output_dir=tmp_path / "exported")
    export_saved(other, output_dir=tmp_path / "fresh")
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "exported" / name).read_text() == (tmp_path / "fresh" / name).read_text()
    with pytest.raises(ValueError, match="contains the weights of another model"):
        export_saved(run, output_dir=other / "model")


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_others_may_read_what_a_run_and_an_export_write(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    main(["train", "linear_probe", "--images_per_class", "20", "--output_dir", str(folder)])
    main(["export", str(folder), "--format", "onnx"])
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*.safetensors")}
    assert len(modes) == 1
    assert modes == {(folder / "results.json").stat().st_mode & 0o777}


@pytest.mark.parametrize("engine", FORMATS)
def test_predictions_of_an_exported_file_equal_those_of_the_weights(
    engine: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "alone"
    main(["export", str(run), "--format", engine, "--output_dir", str(folder)])
    assert not list(folder.glob("*.safetensors"))
    rng = np.random.default_rng(1)
    for i in range(6):
        (tmp_path / "images/test" / LABELS[i % 2]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8))
        image.save(tmp_path / "images/test" / LABELS[i % 2] / f"{i}.png")
    files = [str(path) for path in sorted((tmp_path / "images").rglob("*.png"))]
    capsys.readouterr()
    main(["predict", str(run / "model"), *files, "--json", "--engine", "eager"])
    expected = json.loads(capsys.readouterr().out)
    for flags in (["--engine", engine], []):  # without weights, `auto` runs the file
        main(["predict", str(folder), *files, "--format", "jsonl", *flags])
        shown = capsys.readouterr()
        rows = [json.loads(line) for line in shown.out.splitlines()]
        assert "6 images in " in shown.err
        for row, other in zip(rows, expected, strict=True):
            assert [e["label"] for e in row["labels"]] == [e["label"] for e in other["labels"]]
            assert [e["score"] for e in row["labels"]] == pytest.approx([e["score"] for e in other["labels"]], abs=1e-4)
    metrics = []
    for model, flag in ((run / "model", "eager"), (folder, engine)):
        main(["evaluate", str(model), "--dataset", str(tmp_path / "images"), "--engine", flag, "--json"])
        metrics.append(json.loads(capsys.readouterr().out))
    assert metrics[1]["num_samples"] == 6
    assert metrics[1]["accuracy"] == metrics[0]["accuracy"]
    assert metrics[1]["nll"] == pytest.approx(metrics[0]["nll"], abs=1e-4)


@pytest.mark.parametrize("checkpoint", ["embedded", "timm ViT"])
def test_int8_files_of_a_run_keep_its_labels(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network of convolutions and one with attention, whose methods differ. The data are `sklearn/digits`."""
    pytest.importorskip("nncf", reason="the extra `int8` is not installed")
    import onnx

    if checkpoint != "embedded":
        write_upstream(checkpoint, tmp_path / "upstream")
        checkpoint = str(tmp_path / "upstream")
    run, model = tmp_path / "run", tmp_path / "run/model"
    words = ["--checkpoint", checkpoint, "--images_per_class", "30", "--export_precision", "int8"]
    main(["train", "linear_probe", "--output_dir", str(run), *words, "--export", "onnx"])
    main(["export", str(run), "--format", "openvino", "--export_precision", "int8"])
    records = read_records(model)
    assert [record.file for record in records] == ["onnx/model_int8.onnx", "openvino/model_int8.xml"]
    for record in records:
        assert record.accuracy is not None
        assert record.accuracy.split == "test"
        assert record.logits > TOLERANCE  # the numbers are really rounded
        assert record.accuracy.before is not None
        assert record.accuracy.after is not None
        assert record.accuracy.after >= record.accuracy.before - 0.05
        assert record.accuracy.agreement >= 0.9
    weights = [t for t in onnx.load(model / "onnx/model_int8.onnx").graph.initializer if np.prod(t.dims) >= 256]
    num_int8 = sum(np.prod(t.dims) for t in weights if t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8))
    assert num_int8 > 0.8 * sum(np.prod(t.dims) for t in weights)
    parameters = sum(parameter.numel() for parameter in load(str(model)).model.parameters())
    assert (model / "openvino/model_int8.bin").stat().st_size < 2 * parameters  # a float32 file has 4 bytes for each
    description = (model / "openvino/model_int8.xml").read_text()
    if checkpoint == "embedded":  # a vision transformer broadcasts its class token to the batch
        assert 'type="Broadcast"' not in description  # the biases of convolutions have their shape already
    assert "\n" not in description.partition("?>")[2].strip()
    for engine, record in zip(FORMATS, records, strict=True):
        capsys.readouterr()
        words = ["--dataset", "sklearn/digits", "--split", "test", "--engine", engine, "--export_precision", "int8"]
        main(["evaluate", str(model), *words, "--json"])
        assert record.accuracy is not None
        assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(record.accuracy.after)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    for engine in FORMATS:
        main(
            ["predict", str(model), str(tmp_path / "a.png"), "--engine", engine, "--export_precision", "int8", "--json"]
        )
        assert len(json.loads(capsys.readouterr().out)) == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("predict {model} {image} --engine onnx", "has no onnx/model.onnx; write it with hf-transfer export"),
        ("predict embedded {image} --engine onnx", "is no folder here"),
        ("predict {model} {image} --export_precision int8", "engine auto runs the weights"),
        ("export {nothing}", "neither a run (results.json, model/) nor a model"),
        ("export {model} --export_precision int8", "calibration needs training images"),
        ("export {model} --format openvino --with_preprocessing", "only ONNX contains the preprocessing"),
        ("export {model} --label_column x", "give --dataset too"),
    ],
)
def test_a_mistake_is_named(command: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_upstream("timm ResNet", tmp_path / "model")
    (tmp_path / "nothing").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    places = {"model": tmp_path / "model", "nothing": tmp_path / "nothing", "image": tmp_path / "a.png"}
    with pytest.raises(SystemExit) as stop:
        main([word.format(**places) for word in command.split()])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
