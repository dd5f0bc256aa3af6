"""Adapters: identity at the start, in their map's layer, merged = unmerged (law 8), saved = trained (law 7), or refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sessions import make_session
from torch import nn

from hf_transfer.cli import main
from hf_transfer.hub.save import save_model
from hf_transfer.network.adapters import (
    Adapted,
    add_adapters,
    check_saved_apart,
    is_adapter_folder,
    load_adapted,
    merge_adapters,
)
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.chain import Chain, build_chain
from hf_transfer.network.freezing import set_trainable
from hf_transfer.network.methods import METHODS, AdapterConfig, is_adaptable
from hf_transfer.network.targets import find_targets
from hf_transfer.settings import list_settings
from hf_transfer.strategy import Strategy, default_config
from hf_transfer.training.checkpoints import StateWriter
from hf_transfer.training.phase import TrainPhase
from hf_transfer.training.plan import run_plan
from hf_transfer.training.records import RunResult
from tests.families import built, make_pixels
from tests.test_recipes import run_recipe
from tests.test_save import LABELS, answers, results_for, write_upstream

BASE = "someone/upstream"
ARCHITECTURES = ("timm ViT", "timm ConvNeXt", "timm ResNet", "ViT", "Swin")
PAIRS = [(name, method) for name in ARCHITECTURES for method in METHODS]

LOADER = """
import sys
sys.modules["hf_transfer"] = None  # an import of it fails here, as where it is not installed
import json, timm, torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
root, upstream, library, *folders = sys.argv[1:]
images = [Image.open(f"{root}/{i}.png") for i in range(2)]
found = {}
def base(source=upstream):
    if library == "timm":
        return timm.create_model(f"local-dir:{source}", pretrained=True, num_classes=3)
    return AutoModelForImageClassification.from_pretrained(source, num_labels=3, ignore_mismatched_sizes=True)
def logits(model):
    with torch.no_grad():
        answer = model.eval()(pixels)
    return (answer if library == "timm" else answer.logits).tolist()
for folder in folders:
    model = base()
    if library == "timm":
        transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg), is_training=False)
        pixels = torch.stack([transform(i) for i in images])
    else:
        pixels = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]
    adapted = PeftModel.from_pretrained(model, folder)
    found[folder] = {"adapter": logits(adapted), "merged": logits(base(folder + "-merged"))}
both = PeftModel.from_pretrained(base(), f"{root}/lora", adapter_name="lora")
both.load_adapter(f"{root}/dora", adapter_name="dora")
for name in ("dora", "lora"):
    both.set_adapter(name)
    found[f"switched to {name}"] = logits(both)
print(json.dumps(found))
"""


def make_adapter(method: str, **more: Any) -> AdapterConfig:
    return AdapterConfig(method=method, rank=None if method == "ia3" else 4, **{"targets": "all", **more})


def run(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    output = model(pixels)
    return output if isinstance(output, torch.Tensor) else output.logits


def move(adapted: Adapted) -> None:
    """As training would: every adapter's parameters and the head's are elsewhere."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if name in adapted.trained or adapted.head.owns(name):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("upstream")
    for i, name in enumerate(ARCHITECTURES):
        write_upstream(name, root / str(i))
    return {name: root / str(i) for i, name in enumerate(ARCHITECTURES)}


def start(upstreams: dict[str, Path], name: str) -> tuple[Backbone, Chain]:
    backbone = load(str(upstreams[name]), LABELS, base_model=BASE)
    return backbone, backbone.chain(cache_dir=upstreams[name].parent / "chains")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def saved(
    request: pytest.FixtureRequest, upstreams: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, Any], Path]:
    """Of an architecture and every working method: our logits apart and merged, and what a process without us found."""
    name = request.param
    root = tmp_path_factory.mktemp("saved")
    images = [Image.effect_noise((48, 40), 90).convert("RGB"), Image.linear_gradient("L").convert("RGB")]
    for i, image in enumerate(images):
        image.save(root / f"{i}.png")
    ours = {}
    for method in sorted(METHODS):
        backbone, chain = start(upstreams, name)
        adapted, _ = add_adapters(backbone, chain, make_adapter(method))
        move(adapted)
        apart = answers(adapted, images)
        save_model(adapted, results_for(adapted), root / method)
        merged = merge_adapters(adapted)
        ours[method] = (apart, answers(merged, images))
        save_model(merged, results_for(merged), root / f"{method}-merged")
    library = "timm" if name.startswith("timm") else "transformers"
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADER, str(root), str(upstreams[name]), library]
        + [str(root / method) for method in ours],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    return name, ours, json.loads(shown.stdout.splitlines()[-1]), root


def test_saved_and_merged_answer_as_trained_where_we_are_not_installed(
    saved: tuple[str, dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, Any], Path],
) -> None:
    name, ours, found, root = saved
    for method, (apart, merged) in ours.items():
        loaded = {key: torch.tensor(value) for key, value in found[str(root / method)].items()}
        for key, logits in (("merged here", merged), *loaded.items()):
            # float32; a merged map rounds once what two rounded, over the few layers of a tiny network.
            assert torch.allclose(logits, apart, rtol=1e-4, atol=2e-5), (
                name,
                method,
                key,
                (logits - apart).abs().max(),
            )
    for method in ("lora", "dora"):
        assert torch.allclose(torch.tensor(found[f"switched to {method}"]), ours[method][0], rtol=1e-4, atol=2e-5), (
            method
        )


@pytest.mark.parametrize("method", METHODS)
def test_adapters_at_their_start_read_the_plain_networks_stores(method: str, upstreams: dict[str, Path]) -> None:
    """The same keys, until they have moved; methods that are the identity up to rounding have keys of their own."""
    backbone, plain = start(upstreams, "timm ViT")
    cuts = list(plain.cuts)
    before = plain.fingerprint(cuts)
    adapted, chain = add_adapters(backbone, plain, make_adapter(method))
    after = chain.fingerprint(cuts)
    if method in ("lora", "loha", "ia3"):  # nothing is added, or all is multiplied by one
        assert after == before
    elif after != before:  # whether DoRA rounds depends on the machine
        assert after["features"] not in before.values()
    move(adapted)
    moved = chain.fingerprint(cuts)
    assert moved[cuts[-1].name] != after[cuts[-1].name]


def test_an_adapter_folder_names_its_base_and_no_path(
    saved: tuple[str, dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, Any], Path], upstreams: dict[str, Path]
) -> None:
    name, ours, _, root = saved
    for method in ours:
        config = json.loads((root / method / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == BASE
        task = json.loads((root / method / "task.json").read_text())
        assert task["label_names"] == list(LABELS)
        assert not (root / method / "config.json").exists()
        for file in (root / method).glob("*.[jm]*"):
            assert str(upstreams[name].parent) not in file.read_text(), file
        card = (root / method / "README.md").read_text()
        assert f"base_model: {BASE}" in card
        assert "base_model_relation: adapter" in card
        assert "PeftModel.from_pretrained" in card


def test_an_adapter_folder_is_loaded_onto_the_weights_it_was_trained_on(
    saved: tuple[str, dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, Any], Path], upstreams: dict[str, Path]
) -> None:
    name, ours, _, root = saved
    images = [Image.open(root / f"{i}.png") for i in range(2)]
    for method in ("dora", "ia3"):
        assert is_adapter_folder(str(root / method))
        assert not is_adapter_folder(str(root / f"{method}-merged"))
        again = load_adapted(root / method, checkpoint=str(upstreams[name]))
        assert again.label_names == LABELS
        assert again.source.id == BASE
        assert again.model.state_dict().keys() == load(str(upstreams[name]), LABELS).model.state_dict().keys()
        assert torch.allclose(answers(again, images), ours[method][0], rtol=1e-4, atol=2e-5)
    with pytest.raises(ValueError, match="trained on other weights"):
        load_adapted(root / "dora", checkpoint=str(root / "dora-merged"))
    with pytest.raises(ValueError, match="no adapter folder"):
        load_adapted(upstreams[name])


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_adapters_start_as_the_identity_in_the_layers_of_their_maps(
    upstreams: dict[str, Path], name: str, method: str
) -> None:
    backbone, chain = start(upstreams, name)
    pixels = make_pixels(chain.image_shape, 2)
    before = run(backbone.model, pixels)
    adapted, chain = add_adapters(backbone, chain, make_adapter(method, layers="last:1"))
    assert torch.allclose(run(adapted.model, pixels), before, atol=1e-4)
    names = [n for layer in chain.layers for n in layer.parameters]
    assert sorted([*names, *chain.unused_parameters]) == sorted(n for n, _ in adapted.model.named_parameters())
    trainable = adapted.policy().select(chain)
    assert trainable - set(chain.classifier_parameters) == adapted.trained
    assert adapted.trained <= set(chain.layers[-2].parameters)
    assert chain.lowest_cut(trainable) == chain.layers[-3].cut
    copy = chain.replicate().model  # what a thread of its own runs: other modules, the same tensors
    assert torch.equal(run(copy, pixels), run(adapted.model, pixels))
    assert {id(p) for p in copy.parameters()} == {id(p) for p in adapted.model.parameters()}


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_the_split_stays_exact_and_gradients_reach_every_adapter(
    upstreams: dict[str, Path], name: str, method: str
) -> None:
    backbone, chain = start(upstreams, name)
    adapted, chain = add_adapters(backbone, chain, make_adapter(method))
    move(adapted)
    pixels = make_pixels(chain.image_shape, 2)
    set_trainable(adapted.model, adapted.policy().select(chain))
    whole = run(adapted.model, pixels)
    for cut, activation in zip(chain.cuts, chain.run_prefix(chain.cuts, pixels), strict=True):
        with chain.part(cut) as suffix:
            assert torch.allclose(suffix(activation), whole, rtol=1e-5, atol=1e-5), cut.name
    whole.square().sum().backward()
    for parameter_name, parameter in adapted.model.named_parameters():
        assert (parameter.grad is not None) == (parameter_name in adapted.policy().select(chain)), parameter_name


@pytest.fixture(scope="module")
def networks(upstreams: dict[str, Path]) -> dict[str, Chain]:
    return {name: built(name)[1] for name in ("timm ViT", "timm Swin", "timm ResNet", "timm MobileNetV2", "Swin")}


def found(chain: Chain, **how: Any) -> set[str]:
    return set(find_targets(chain, AdapterConfig(rank=4, **how)).modules)


def test_targets_are_found_in_fused_and_split_attention(networks: dict[str, Chain]) -> None:
    fused = {f"blocks.{i}.attn.{part}" for i in (0, 1) for part in ("qkv", "proj")}
    maps = {f"blocks.{i}.mlp.{part}" for i in (0, 1) for part in ("fc1", "fc2")}
    assert found(networks["timm ViT"]) == found(networks["timm ViT"], targets="attention") == fused
    assert found(networks["timm ViT"], targets="mlp") == maps
    assert found(networks["timm ViT"], targets="all") == fused | maps
    assert found(networks["timm ViT"], targets="all", layers="last:1") == {n for n in fused | maps if ".1." in n}
    assert found(networks["timm ViT"], targets=r"qkv|patch_embed") == {n for n in fused if "qkv" in n} | {
        "patch_embed.proj"
    }
    parts = {n.rpartition(".")[2] for n in found(networks["Swin"])}
    assert parts == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {n.rpartition(".")[2] for n in found(networks["timm Swin"])} == {"qkv", "proj"}


@pytest.mark.parametrize("name", ["timm ViT", "timm Swin", "timm ResNet", "timm MobileNetV2", "Swin"])
@pytest.mark.parametrize("targets", ["auto", "all", "."])
def test_the_head_is_never_a_target(networks: dict[str, Chain], name: str, targets: str) -> None:
    chain = networks[name]
    how = AdapterConfig(method="ia3", targets=targets)
    own = {layer.parameters for layer in chain.layers[-1:]}.pop()
    assert not [n for n in find_targets(chain, how).modules if any(p.startswith(n + ".") for p in own)]


def test_a_conv_net_is_adapted_whole_but_for_what_the_method_cannot_take(networks: dict[str, Chain]) -> None:
    chain = networks["timm MobileNetV2"]
    targets = find_targets(chain, AdapterConfig(rank=4))
    assert {n.rpartition(".")[2] for n in targets.modules} == {"conv_pw", "conv_pwl", "conv_head"}
    assert {n.rpartition(".")[2] for n in targets.left_out} == {"conv_dw"}
    assert "not divisible by the convolution's" in next(iter(targets.left_out.values()))
    assert not find_targets(chain, AdapterConfig(method="loha", rank=4)).left_out
    assert "conv_stem" not in targets.modules


@pytest.mark.parametrize(
    ("network", "how", "message"),
    [
        ("timm ResNet", {"targets": "attention"}, "has no attention; choose one of mlp, all, or a regular expression"),
        ("timm ResNet", {"targets": "query"}, r"matches no module\..*layerN?"),
        (
            "timm ViT",
            {"targets": "query"},
            r"matches no module\. Possible are attention, mlp, all or .*blocks.N.attn.qkv",
        ),
        ("timm ViT", {"targets": "^head"}, r"but the head \(head\), which trains without an adapter"),
        ("timm ViT", {"targets": "norm1"}, "of the kind that lora adapts, but blocks.0.norm1"),
        ("timm ViT", {"rank": 32}, r"rank 32 is larger than the module's width 24.*--rank 1 or 2 or 4 or 8 or 16"),
        ("timm ViT", {"layers": "last:9"}, "this chain has 2 layers; choose last:1 to last:2"),
        ("timm ViT", {"targets": "blocks.0", "layers": "last:1"}, "no such module lies in the layers last:1"),
        (
            "timm MobileNetV2",
            {"targets": "conv_dw", "rank": 4},
            "is not divisible by the convolution's .* groups.*--adapter loha or ia3",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_what_can(
    networks: dict[str, Chain], network: str, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_targets(networks[network], AdapterConfig(**how))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"method": "lorra"}, "choose 'lora' or 'dora' or 'loha' or 'ia3'"),
        ({"rank": 0}, "choose 1 <= rank"),
        ({"alpha": 0.0}, "choose 0 < alpha"),
        ({"method": "ia3", "rank": 4}, "ia3 has no rank"),
        ({"method": "ia3", "alpha": 4.0}, "ia3 has no alpha"),
        ({"targets": "("}, "is not a regular expression"),
        ({"layers": "first:1"}, "choose all, or last:K"),
    ],
)
def test_a_wrong_setting_says_what_is_allowed(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**how)


class PadsItself(nn.Conv2d):
    """As timm's Conv2dSame: an adapter beside it would pad otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


def test_a_map_that_does_more_than_its_type_says_is_left_alone() -> None:
    assert is_adaptable(nn.Conv2d(3, 4, 3))
    assert not is_adaptable(PadsItself(3, 4, 3))
    assert not is_adaptable(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    assert not is_adaptable(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))


@pytest.fixture(scope="module")
def direct() -> Chain:
    """BEiT computes with qkv's weight without calling it: an adapter beside it would never run."""
    return build_chain(
        timm.create_model("beit_base_patch16_224", embed_dim=24, depth=2, num_heads=2, img_size=32, num_classes=3),
        (3, 32, 32),
    )


def test_a_map_that_is_not_called_is_left_alone_and_named(direct: Chain) -> None:
    targets = find_targets(direct, AdapterConfig(rank=4, targets="attention"))
    assert set(targets.modules) == {"blocks.0.attn.proj", "blocks.1.attn.proj"}
    assert targets.describe_left_out() == [
        "no adapter for 2 modules blocks.N.attn.qkv: the network reads the weight without calling the module"
    ]
    with pytest.raises(ValueError, match=r"matches no module of the kind that lora adapts, but blocks\.0\.attn\.qkv"):
        find_targets(direct, AdapterConfig(rank=4, targets="qkv"))


def test_convolutions_that_normalise_their_weight_are_refused() -> None:
    chain = build_chain(timm.create_model("nf_resnet26", num_classes=3), (3, 64, 64))
    with pytest.raises(ValueError, match=r"could not be merged\. Choose the strategy last_layers"):
        find_targets(chain, AdapterConfig())


def test_an_adapter_without_a_base_id_is_refused(upstreams: dict[str, Path]) -> None:
    backbone = load(str(upstreams["timm ViT"]), LABELS)
    adapted, _ = add_adapters(backbone, backbone.chain(), make_adapter("lora"))
    with pytest.raises(ValueError, match="--base_model owner/name if the Hub has its weights, or save a merged model"):
        check_saved_apart(adapted)


def test_an_adapter_of_a_fine_tuned_folder_does_not_name_the_folders_base(
    upstreams: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(upstreams["timm ViT"], tmp_path / "tuned")
    (tmp_path / "tuned" / "README.md").write_text(f"---\nbase_model: {BASE}\nbase_model_relation: finetune\n---\n")
    backbone = load(str(tmp_path / "tuned"), LABELS)
    adapted, _ = add_adapters(backbone, backbone.chain(), make_adapter("lora"))
    with pytest.raises(ValueError, match="tuned is a folder without a Hub id"):
        check_saved_apart(adapted)


def test_moved_running_statistics_are_saved(upstreams: dict[str, Path], tmp_path: Path) -> None:
    backbone, chain = start(upstreams, "timm ResNet")
    adapted, chain = add_adapters(backbone, chain, make_adapter("lora"))
    move(adapted)
    with torch.no_grad():
        adapted.model.get_buffer("layer2.0.bn1.running_mean").add_(1.0)
    pixels = make_pixels(chain.image_shape, 2)
    expected = run(adapted.model, pixels)
    save_model(adapted, results_for(adapted), tmp_path / "model")
    fresh, _ = start(upstreams, "timm ResNet")
    again = peft.PeftModel.from_pretrained(fresh.model, tmp_path / "model").eval()
    assert torch.allclose(run(again, pixels), expected, rtol=1e-4, atol=2e-5)


# --- training ---------------------------------------------------------------------------------------------------------


def train(folder: Path, watch: str | None = None, **settings: Any) -> tuple[Adapted, RunResult, int]:
    """Adapters on the embedded checkpoint; with how many images went through the module `watch`.

    Without a probe before them, or the probe would be kept.
    """
    session = make_session("lora", folder, **{"rank": 4, "lr": 1e-3, **settings})
    assert isinstance(session.strategy, Strategy)
    session = session.strategy.prepare(session)
    adapted = session.backbone
    assert isinstance(adapted, Adapted)
    images = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], *_: Any) -> None:
        nonlocal images
        images += len(inputs[0])

    if watch is not None:
        session.chain.model.get_submodule(watch).register_forward_hook(count)
    epochs, steps = session.gradient.training.epochs, session.gradient.optimization
    result = run_plan(session, [TrainPhase(policy=adapted.policy(), epochs=epochs, optimization=steps)])
    return adapted, result, images


def test_adapters_of_the_last_layers_leave_a_prefix_that_runs_once(tmp_path: Path) -> None:
    adapters = {"targets": "all", "adapter_layers": "last:2", "cache": "memory"}

    def count(views: int, epochs: int) -> int:
        folder = tmp_path / f"{views} {epochs}"
        return train(folder, watch="layer2.0.conv1", cache_views=views, epochs=epochs, **adapters)[2]

    assert count(2, 2) == count(2, 4)
    assert count(0, 4) > count(0, 2)


def test_the_upstream_weights_keep_every_bit_and_the_adapters_move(tmp_path: Path) -> None:
    adapted, result, _ = train(tmp_path, targets="all", cache_views=0)
    upstream = load("embedded").model.state_dict()
    now = {name.replace(".base_layer.", "."): value for name, value in adapted.model.state_dict().items()}
    assert all(torch.equal(now[name], value) for name, value in upstream.items() if not name.startswith("fc."))
    second = [value for name, value in now.items() if ".lora_B." in name]
    assert second
    assert all(bool(value.abs().sum()) for value in second)
    assert result.phases[-1].num_trainable == adapted.num_trainable
    assert adapted.describe()["trainable_share"] == pytest.approx(adapted.trainable_share)


@pytest.mark.parametrize("adapters", [{}, {"adapter": "loha", "rank": 2, "adapter_layers": "last:3"}])
def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: dict[str, Any]
) -> None:
    settings = {**adapters, "cache_views": 0, "save_every_s": 1e-9}
    whole, _, _ = train(tmp_path / "whole", **settings)
    saves = 0

    def stop_at_the_fourth(writer: StateWriter, state: dict[str, Any]) -> None:
        nonlocal saves
        saves += 1
        write(writer, state)
        if saves == 4:
            raise KeyboardInterrupt

    write = StateWriter.write
    with monkeypatch.context() as patch:
        patch.setattr(StateWriter, "write", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", **settings)
    resumed, result, _ = train(tmp_path / "cut", resume=True, **settings)
    assert result.resumed
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.soak
def test_two_processes_train_the_same_adapters(tmp_path: Path) -> None:
    """Law 6: the same global batch, real processes over gloo."""
    flags = (
        "--images_per_class", "16", "--epochs", "2", "--tracker", "none", "--no-merge", "--base_model", BASE, "--rank", "4",
        # So that an epoch is better than the probe and is kept.
        "--crop_scale", "1", "--hflip", "0", "--color_jitter", "0", "--label_smoothing", "0", "--lr", "0.01",
        "--ema_decay", "0", "--select_by", "log_loss",
    )  # fmt: skip
    run_recipe("lora", *flags, "--batch_size", "16", "--output_dir", str(tmp_path / "one"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    env = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_TRANSFER_CACHE": str(tmp_path / "cache")}
    two = ("--batch_size", "8", "--output_dir", str(tmp_path / "two"))
    run_recipe("lora", *flags, *two, launcher=launcher, env=env)
    one, both = (load_file(tmp_path / run / "model" / "adapter_model.safetensors") for run in ("one", "two"))
    assert one.keys() == both.keys()
    assert any(bool(value.abs().sum()) for name, value in one.items() if "lora_B" in name)
    for name, value in one.items():
        # Sums of gradients are added in another order, and AdamW's first steps divide by their own size.
        assert torch.allclose(both[name], value, rtol=2e-3, atol=2e-3), name
    # The folder is for peft alone, with plain timm.
    base = load("embedded", [str(i) for i in range(10)]).model
    peft.PeftModel.from_pretrained(base, tmp_path / "one" / "model")


def test_a_recipe_without_a_base_id_stops_before_it_trains(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="Give --base_model owner/name"):
        run_recipe("lora", "--no-merge", "--output_dir", str(tmp_path))
    assert not (tmp_path / "checkpoints" / "state.safetensors").exists()


def test_the_flag_lists_the_methods() -> None:
    assert list_settings(default_config("lora"))["adapter"].choices == tuple(METHODS)


def test_inspect_prints_targets_and_what_they_train(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "--adapter", "lora", "--rank", "4", "--adapter_layers", "last:2"])
    lines = capsys.readouterr().out.splitlines()
    assert "lora rank 4 alpha 4" in lines
    rows = {line.split("  ")[0]: line.split() for line in lines}
    assert rows["layer4.N.conv1"][1] == "2"
    assert rows["adapters"][2] == "12,800"  # 4 x (64 + 80 x 3 convolutions) x 9 + 4 x 80 x 4 + 4 x (64 + 80)
    assert "cut: after layer3.1" in lines
    with pytest.raises(SystemExit):
        main(["inspect", "--adapter", "oft"])
    assert "choose from 'lora', 'dora', 'loha', 'ia3'" in capsys.readouterr().err
