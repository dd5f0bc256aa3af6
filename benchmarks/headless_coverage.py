"""Which checkpoints without a classifier are covered: each is made small, trained, saved, and loaded again by its library.

Every checkpoint has random weights and takes small images. `python benchmarks/coverage.py --library headless` runs all. Each is

- loaded, and its last hidden state and pooled feature are compared with those of upstream's own class on the same pixels;
- trained on a few embedded digits: a solved head (the linear probe), then one epoch of `last_layers`;
- saved, and loaded by plain transformers or timm in a process without hf_transfer, which must compute the same logits.

Some checkpoints must be refused, with one line that says why.
"""

import copy
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from hf_transfer.hub import fresh_process
from hf_transfer.hub.save import save_model
from hf_transfer.hub.verify import PIXEL_TOLERANCE, TOLERANCE, find_libraries, write_reference
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.timm_models import save_timm
from hf_transfer.strategy import Strategy
from hf_transfer.training.phase import SolveHeadPhase
from hf_transfer.training.plan import run_plan
from tests.families import make_pixels, randomize
from tests.headless import LAYOUTS, MORE_LAYOUTS, Layout, our_features, upstream_features
from tests.remote import KINDS, write_checkpoint
from tests.sessions import make_config, make_session, read_data
from tests.test_save import results_for

RELATIVE = 1e-5
IMAGE_PX = (32, 64, 96, 112, 128)  # tried in this order, then the network's own size
ROUNDING_LIMIT = 1e-3  # largest allowed difference of logits if float32 itself is less exact than TOLERANCE, relative
NUM_CLASSES = 4  # digits
MAX_PARAMETERS = 150e6  # a family whose smallest member is larger, with few blocks too, is left out
OTHER_TASKS = re.compile(r"^(volo|naflexvit|csatv2|test_)")  # timm families that are no plain backbones; see REFUSED
SETTINGS: dict[str, Any] = {
    "k": 1,
    "epochs": 1,
    "images_per_class": None,
    "batch_size": 8,
    "cache": "none",
    "num_workers": 0,
}

SHALLOW: tuple[dict[str, Any], ...] = (  # arguments for fewer blocks, tried in this order
    {"depth": 2}, {"depths": [1, 1, 1, 1]}, {"layers": [1, 1, 1, 1]}, {},
)  # fmt: skip

Features = Callable[[Backbone, torch.Tensor], list[tuple[str, torch.Tensor, torch.Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A checkpoint in a folder, and the features that must be equal: name, ours, upstream's."""

    name: str
    compare: Features | None = None
    settings: dict[str, Any] | None = None  # of the run


@dataclass(frozen=True, kw_only=True)
class Case:
    """How to write one checkpoint into a folder. `refused`: a part of the one line that must refuse the checkpoint."""

    library: str
    family: str
    make: Callable[[Path], Made]
    refused: str | None = None


def list_cases() -> Iterator[Case]:
    """Yields all cases: of transformers, with code of their own, of timm, and those that must be refused."""
    for name, layout in {**LAYOUTS, **MORE_LAYOUTS}.items():
        yield Case(library="transformers", family=name, make=partial(_make_layout, name, layout))
    for name in KINDS:
        yield Case(library="remote code", family=name, make=partial(_make_remote, name))
    yield from _list_variants()
    for module in timm.list_modules():
        members: dict[str, list[str]] = {}
        for name in timm.list_models(module=module):
            match = re.match(r"[a-z]+(v\d)?", name)
            if match and not OTHER_TASKS.match(name):
                members.setdefault(match[0], []).append(name)
        for word, names in sorted(members.items()):
            yield Case(library="timm", family=f"{module}: {word}", make=partial(_make_timm, names))


# --- transformers -----------------------------------------------------------------------------------------------------


def _make_layout(name: str, layout: Layout, folder: Path) -> Made:
    upstream = layout.save(folder)

    def compare(backbone: Backbone, pixels: torch.Tensor) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        hidden, pooled = upstream_features(name, upstream, pixels)
        ours, features = our_features(backbone, pixels)
        if name.startswith("ViT") and type(backbone.model).__name__ == "ViTForImageClassification":
            pooled = hidden[:, 0]  # transformers' classifier leaves out the pooler of the pretraining task
        pairs = [("last hidden state", ours, hidden)]
        if pooled is not None:  # DINOv2's classifier appends the mean of the grid
            pairs.append(("pooled", features[:, : pooled.shape[1]], pooled))
        return pairs

    return Made(name=layout.model, compare=compare)


def _make_remote(kind: str, folder: Path) -> Made:
    folder.rmdir()
    upstream = write_checkpoint(folder, kind)

    def compare(backbone: Backbone, pixels: torch.Tensor) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        model: Any = backbone.model
        with torch.no_grad():
            output, expected = model.backbone(pixels), upstream(pixels)
        return [("output", output[0], expected[0])]

    return Made(name=kind, compare=compare, settings={"trust_remote_code": True})


def _list_variants() -> Iterator[Case]:
    """Yields files as people publish them, and checkpoints that must be refused."""

    def make(change: Callable[[Path], None], folder: Path) -> Made:
        made = _make_layout("ViT", LAYOUTS["ViT"], folder)
        change(folder)
        return made

    def only_processor_config(folder: Path) -> None:
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").unlink()
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))

    def pickled(folder: Path) -> None:
        weights = transformers.ViTModel.from_pretrained(folder).state_dict()
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")

    def sharded(folder: Path) -> None:
        model = transformers.ViTModel.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")

    def open_clip(folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        (folder / "open_clip_config.json").write_text('{"model_cfg": {}}')
        save_file({"weight": torch.zeros(1)}, folder / "open_clip_model.safetensors")

    def bare(folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        torch.save({"weight": torch.zeros(1)}, folder / "checkpoint.pth")

    def naflex(folder: Path) -> Made:
        transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_patches=16, patch_size=8,
        )).save_pretrained(folder)  # fmt: skip
        return Made(name="Siglip2VisionModel")

    for family, change in {
        "ViT, processor_config.json alone": only_processor_config,
        "ViT, pytorch_model.bin": pickled,
        "ViT, sharded safetensors": sharded,
    }.items():
        yield Case(library="transformers", family=family, make=partial(make, change))
    yield Case(library="transformers", family="SigLIP 2 NaFlex", make=naflex, refused="spatial_shapes")
    yield Case(library="files", family="open_clip", make=partial(make, open_clip), refused="open_clip")
    yield Case(library="files", family="bare .pth", make=partial(make, bare), refused="pth")
    volo = timm.list_models("volo*")
    yield Case(library="timm", family="volo: volo", make=partial(_make_timm, volo), refused="probe")
    for family, (name, arguments, model_args) in PATHOLOGY.items():
        yield Case(library="timm", family=family, make=partial(_make_pathology, name, arguments, model_args))


# --- timm -------------------------------------------------------------------------------------------------------------


def _make_timm(names: list[str], folder: Path) -> Made:
    """Saves the family's member with the fewest parameters, without a head, at the smallest image size that it takes."""

    def count(name: str, arguments: dict[str, Any]) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name, num_classes=0, **arguments).parameters())

    name = min(names, key=lambda name: count(name, {}))
    own = timm.get_pretrained_cfg(name)
    assert own is not None
    own_px = own.input_size[-1]
    errors = []
    for px in (*(p for p in IMAGE_PX if p < own_px), own_px):
        for size, depth in itertools.product(({"img_size": px}, {}), SHALLOW):
            arguments = {**size, **depth}
            try:
                if count(name, arguments) > MAX_PARAMETERS:
                    raise NotImplementedError("more parameters than this benchmark builds")
                torch.manual_seed(0)
                model: Any = randomize(timm.create_model(name, num_classes=0, **arguments)).eval()
                _calibrate(model, torch.randn(8, 3, px, px))
                with torch.no_grad():
                    output = model(torch.randn(2, 3, px, px))
                assert isinstance(output, torch.Tensor), "the output is no tensor"
            except Exception as error:  # noqa: BLE001 - any: another size is tried
                errors.append(error)
            else:
                return _save_timm(model, folder, px, arguments)
    if any(isinstance(error, NotImplementedError) for error in errors):
        raise NotImplementedError(f"left out: {name} has {count(name, {}) / 1e6:.0f} M parameters")
    raise RuntimeError("; ".join(f"{type(error).__name__}: {str(error)[:100]}" for error in errors[-2:]))


def _calibrate(model: nn.Module, pixels: torch.Tensor) -> None:
    """Sets the statistics of BatchNorm to those of `pixels`. With random ones, activations explode, and logits are rounding."""
    norms = [(module, module.momentum) for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module, _ in norms:
        module.momentum = 1.0
        module.train()
    with torch.no_grad():
        model(pixels)
    for module, momentum in norms:
        module.momentum = momentum
    model.eval()


def _save_timm(model: Any, folder: Path, px: int, arguments: dict[str, Any], **settings: Any) -> Made:
    model.pretrained_cfg.update(input_size=(3, px, px), crop_pct=1.0, num_classes=0)
    model._model_args = dict(arguments)
    save_timm(model, folder)
    if (
        not settings
    ):  # config.json is complete: upstream's network is the one that timm loads, which sets fbnetc's epsilon
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def compare(backbone: Backbone, pixels: torch.Tensor) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        ours: Any = backbone.model
        with torch.no_grad():
            features = ours.forward_features(pixels)
            pairs = [("last hidden state", features, model.forward_features(pixels))]
            if isinstance(features, torch.Tensor):
                pairs.append(("pooled", ours.forward_head(features, pre_logits=True), model(pixels)))
        return [(name, a, b) for name, a, b in pairs if isinstance(a, torch.Tensor)]

    return Made(name=model.pretrained_cfg["architecture"], compare=compare, settings=settings)


_TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 32, "patch_size": 8}
# What the card's code creates, and what --model_args must give since config.json lacks it.
PATHOLOGY: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "UNI-like": ("vit_large_patch16_224", {**_TINY, "init_values": 1e-5, "dynamic_img_size": True}, {"init_values": 1e-5}),
    "Virchow-like": (
        "vit_huge_patch14_224",
        {**_TINY, "mlp_ratio": 2.0, "mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "init_values": 1e-5},
        {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU", "init_values": 1e-5},
    ),
    "H-optimus-like": (
        "vit_giant_patch14_reg4_dinov2", {**_TINY, "init_values": 1e-5, "dynamic_img_size": False}, {"init_values": 1e-5}
    ),
}  # fmt: skip


def _make_pathology(name: str, arguments: dict[str, Any], model_args: dict[str, Any], folder: Path) -> Made:
    torch.manual_seed(0)
    model: Any = randomize(timm.create_model(name, num_classes=0, **arguments)).eval()
    known = {key: value for key, value in arguments.items() if key not in model_args}
    made = _save_timm(model, folder, 32, known, model_args=json.dumps(model_args))
    config = json.loads((folder / "config.json").read_text())
    config["global_pool"] = ""
    (folder / "config.json").write_text(json.dumps(config))
    return made


# --- one case ---------------------------------------------------------------------------------------------------------


def check_case(case: Case, folder: Path, dataset: Path) -> dict[str, Any]:
    """Returns the row of `case`, whose trained model is then saved in `folder`; `failures` is empty if all checks held."""
    upstream = folder / "upstream"
    upstream.mkdir()
    made = case.make(upstream)
    row: dict[str, Any] = {"architecture": made.name, "failures": [], "refused": None}
    settings = {key: value for key, value in (made.settings or {}).items() if value is not None}
    try:
        session = make_session("last_layers", checkpoint=str(upstream), dataset=str(dataset), **SETTINGS, **settings)
        if len(session.chain) == 0:
            row["note"] = "no layers between stem and head, so that only the head trains"
            session = make_session(
                "last_layers", checkpoint=str(upstream), dataset=str(dataset), **SETTINGS | settings | {"k": 0}
            )
        backbone = session.backbone
        row["class"] = type(backbone.model).__name__
        row["pooling"] = getattr(getattr(backbone.model, "config", None), "pooling", "")
        if made.compare is not None:
            pixels = make_pixels(backbone.preprocessing.image_shape, 2)
            row["failures"] += [text for pair in made.compare(backbone, pixels) if (text := _differ(*pair))]
        strategy = session.config.strategy
        assert isinstance(strategy, Strategy)
        solve, *steps = strategy.plan(session)
        assert isinstance(solve, SolveHeadPhase)
        result = run_plan(session, [replace(solve, sweep="none", cv_folds=1), *steps])
    except ValueError as error:
        is_right = case.refused is not None and case.refused in str(error) and "\n" not in str(error)
        return row | {"refused": str(error), "failures": [] if is_right else [f"refused: {error}"]}
    if case.refused is not None:
        row["failures"].append("it was not refused")
    row["accuracy"] = result.metrics["test"].accuracy if "test" in result.metrics else None
    reference = folder / "reference.safetensors"
    assert session.data.test is not None
    write_reference(result.backbone, session.data.test, reference)
    row["rounding"] = _measure_rounding(result.backbone, reference)
    save_model(result.backbone, results_for(result.backbone), folder / "model")
    return row


def _write_digits(folder: Path) -> None:
    """Writes a few embedded digits as a data set: per class four images for training, and one each for the other splits."""
    digits = read_data(make_config("last_layers", dataset="sklearn/digits").data).train
    labels = digits.labels.tolist()
    for label in range(NUM_CLASSES):
        rows = [i for i, other in enumerate(labels) if other == label][:6]
        for split, i in zip(("train",) * 4 + ("validation", "test"), rows, strict=True):
            path = folder / split / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            digits.image(i).save(path)


def _measure_rounding(backbone: Backbone, reference: Path) -> float:
    """Returns how far the reference's logits are from those in float64, relative to the largest, or 0 without float64."""
    stored = load_file(reference)
    try:
        with torch.no_grad():
            exact = compute_logits(copy.deepcopy(backbone.model).double().eval(), stored["inputs"].double())
    except (RuntimeError, TypeError):
        return 0.0
    return float((exact - stored["logits"]).abs().max() / stored["logits"].abs().max().clamp(min=1.0))


def _differ(name: str, ours: torch.Tensor, expected: torch.Tensor) -> str:
    if ours.shape != expected.shape:
        return f"{name}: {tuple(ours.shape)}, upstream's {tuple(expected.shape)}"
    difference = float((ours - expected).abs().max() / expected.abs().max())
    return "" if difference <= RELATIVE else f"{name} differs by {difference:.1e}"


class FreshProcess:
    """A process without this package, which loads one saved model after another."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("fresh_server.py")), fresh_process.__file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def check(self, folder: Path, row: dict[str, Any]) -> None:
        """Adds to `row` how the model in `folder`, as other libraries load it, differs from what was trained."""
        libraries = find_libraries(folder / "model")
        request = [str(folder / "model"), str(folder / "reference.safetensors"), *libraries]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the process died", "results": []}')
        tolerance = max(TOLERANCE, min(2 * row["rounding"], ROUNDING_LIMIT))
        row["difference"] = max((result["logits"] for result in answer["results"]), default=0.0)
        row["failures"] += [f"in a fresh process: {answer['error']}"] if "error" in answer else []
        for library, result in zip(libraries, answer["results"], strict=False):
            if not (result["logits"] <= tolerance and result["pixels"] <= PIXEL_TOLERANCE and result["labels_agree"]):
                row["failures"].append(f"{library} in a fresh process differs: {result}")

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


Run = Callable[[Callable[[], Iterator[dict[str, Any]]]], dict[str, Any]]  # runs a check in a process of its own


def run_cases(run: Run, only: str | None) -> Iterator[dict[str, Any]]:
    """Yields the row of each case whose name contains the pattern `only`."""
    fresh = FreshProcess()
    try:
        with tempfile.TemporaryDirectory(prefix="hf_transfer-") as parent:
            dataset = Path(parent, "digits")
            _write_digits(dataset)
            read_data(make_config("last_layers", **SETTINGS, dataset=str(dataset)).data)  # each case finds it in memory
            for case in list_cases():
                if only is None or re.search(only, f"{case.library} {case.family}"):
                    yield _run_case(case, run, fresh, dataset)
    finally:
        fresh.stop()


def _run_case(case: Case, run: Run, fresh: FreshProcess, dataset: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hf_transfer-") as parent:
        folder = Path(parent)
        row = run(lambda: iter([check_case(case, folder, dataset)]))
        if (folder / "model").is_dir() and "failures" in row:
            fresh.check(folder, row)
    return {"library": "headless", "family": f"{case.library}, {case.family}", **row}


# --- the section of docs/coverage.md ----------------------------------------------------------------------------------


def is_covered(row: dict[str, Any]) -> bool:
    """Whether all checks held: the checkpoint was trained and loaded again, or was refused as it must be."""
    return "error" not in row and "skipped" not in row and not row["failures"]


def format_totals(rows: list[dict[str, Any]]) -> str:
    """Returns one line: how many checkpoints pass, how many of these are refused as they must be, how many are left out."""
    counted = [row for row in rows if "skipped" not in row]
    passed = [row for row in counted if is_covered(row)]
    refused = sum(row.get("refused") is not None for row in passed)
    share = 100 * len(passed) / max(1, len(counted))
    return (
        f"checkpoints without a head: {len(passed)} of {len(counted)} pass ({share:.1f} %), {refused} of these are refused in "
        f"one line, as they must be; {len(rows) - len(counted)} are left out"
    )


def format_section(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the lines of the section of docs/coverage.md."""
    lines = [
        "## Checkpoints without a head",
        "",
        "Backbones, towers, whole and pretraining models, small with random weights, checked by",
        "`python benchmarks/coverage.py --library headless`. Each is loaded under a new head, and its last hidden state and",
        "pooled feature are compared with those of upstream's own class (1e-5 relative). Then a head is solved, one epoch of",
        "`last_layers` is trained on a few digits, and the saved model is loaded by plain transformers or timm in a fresh",
        "process, which computes the same logits.",
        "",
        f"- {format_totals(rows)}",
        "",
        "| checkpoint | upstream's class | loaded as | pooling | result |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: row["family"]):
        cells = (
            row["family"],
            row.get("architecture", ""),
            row.get("class", ""),
            row.get("pooling", ""),
            _say_result(row),
        )
        lines.append("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ")[:300] for cell in cells) + " |")
    return [*lines, ""]


def _say_result(row: dict[str, Any]) -> str:
    failed = row.get("skipped") or row.get("error") or "; ".join(row["failures"])
    if failed:
        return str(failed)
    if row["refused"]:
        return f"refused: {row['refused']}"
    difference = row.get("difference", 0.0)
    notes = [f"logits within {difference:.0e}, the rounding of float32"] if difference > TOLERANCE else []
    return ", ".join(["passes", *notes, *([row["note"]] if "note" in row else [])])
