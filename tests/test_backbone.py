"""Loading: the upstream class with its own weights, a head for the labels, and a clear word for what cannot be loaded."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.models
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from hf_transfer.network.backbone import create, load, with_new_head
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.source import check_checkpoint
from tests.families import FAMILIES, NUM_CLASSES, make_model, make_pixels

OWN = tuple(f"own {i}" for i in range(NUM_CLASSES))
OTHER = ("Biene", "fourmi", "蝶")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def publish_timm(folder: Path, name: str = "timm ResNet", **config: Any) -> nn.Module:
    model = make_model(name)
    px = FAMILIES[name].image_px
    timm.models.save_for_hf(
        model, str(folder), safe_serialization=True, model_config={"label_names": list(OWN), **config},
        data_config={"input_size": (3, px, px), "interpolation": "bilinear", "crop_pct": 1.0},
    )  # fmt: skip
    return model


def publish_transformers(folder: Path, name: str = "ViT") -> nn.Module:
    model = make_model(name)
    assert isinstance(model, transformers.PreTrainedModel)
    model.config.id2label = dict(enumerate(OWN))
    model.config.label2id = {label: i for i, label in enumerate(OWN)}
    model.save_pretrained(folder)
    px = FAMILIES[name].image_px
    transformers.ViTImageProcessor(size={"height": px, "width": px}).save_pretrained(folder)
    return model


BOTH = pytest.mark.parametrize("publish", [publish_timm, publish_transformers], ids=["timm", "transformers"])
Publish = Callable[[Path], nn.Module]


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- round trips --------------------------------------------------------------------------------------------------------


@BOTH
def test_without_labels_the_checkpoint_comes_as_it_is(publish: Publish, tmp_path: Path) -> None:
    model = publish(tmp_path)
    found = load(str(tmp_path))
    assert type(found.model) is type(model)
    assert found.library == ("transformers" if isinstance(model, transformers.PreTrainedModel) else "timm")
    assert found.label_names == OWN
    assert not found.new_head
    assert not any(m.training for m in found.model.modules())
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.model.state_dict().items())
    pixels = make_pixels(found.preprocessing.image_shape, 2)
    assert torch.equal(compute_logits(found.model, pixels), compute_logits(model, pixels))


@BOTH
def test_the_same_labels_keep_the_head(publish: Publish, tmp_path: Path) -> None:
    model = publish(tmp_path)
    found = load(str(tmp_path), OWN)
    assert not found.new_head
    pixels = make_pixels(found.preprocessing.image_shape, 2)
    assert torch.equal(compute_logits(found.model, pixels), compute_logits(model, pixels))


def test_pvt_gets_as_many_outputs_as_labels(tmp_path: Path) -> None:
    # PvtConfig has num_labels as a field of its own, with the default 1000, which id2label does not change.
    small = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "mlp_ratios": [2] * 4}
    config = transformers.PvtConfig(image_size=64, num_labels=NUM_CLASSES, **small)
    config.id2label = dict(enumerate(OWN))
    transformers.PvtForImageClassification(config).save_pretrained(tmp_path / "pvt")
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "pvt")
    created = create("pvt", OTHER, image_size_px=64, model_args=json.dumps(small))
    for found in (load(str(tmp_path / "pvt"), OTHER), with_new_head(load(str(tmp_path / "pvt")), OTHER), created):
        assert found.new_head
        assert compute_logits(found.model, make_pixels((3, 64, 64), 2)).shape == (2, len(OTHER))
        assert [name.partition(".")[0] for name in found.chain().classifier_parameters] == ["classifier"] * 2
        found.model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
        plain = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
        assert plain.classifier.out_features == len(OTHER)


def test_a_network_that_ignores_the_number_of_labels_is_refused(tmp_path: Path) -> None:
    publish_transformers(tmp_path)
    (tmp_path / "fixed.py").write_text(FIXED_HEAD)
    edit_config(tmp_path, lambda config: config.update(auto_map={"AutoModelForImageClassification": "fixed.Fixed"}))
    with pytest.raises(ValueError, match="Fixed has no classifier with one output for each of the 3 labels; choose"):
        load(str(tmp_path), OTHER, trust_remote_code=True)
    assert load(str(tmp_path), trust_remote_code=True).label_names == OWN  # its own outputs are of use


FIXED_HEAD = """
from torch import nn
from transformers import ViTForImageClassification


class Fixed(ViTForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, 5)
"""


@BOTH
@pytest.mark.parametrize("labels", [OTHER, tuple(reversed(OWN))], ids=["fewer", "as many, in another order"])
def test_other_labels_get_a_new_head_on_the_same_body(
    publish: Publish, labels: tuple[str, ...], tmp_path: Path
) -> None:
    model = publish(tmp_path)
    found = load(str(tmp_path), labels)
    assert found.new_head
    assert found.label_names == labels
    chain = found.chain()
    head = set(chain.classifier_parameters)
    expected = model.state_dict()
    for name, value in found.model.state_dict().items():
        if name in head:
            assert value.shape != expected[name].shape or not torch.equal(value, expected[name]), name
            assert value.isfinite().all()
        else:
            assert torch.equal(value, expected[name]), name
    logits = compute_logits(found.model, make_pixels(found.preprocessing.image_shape, 2))
    assert logits.shape == (2, len(labels))


def test_the_embedded_checkpoint_needs_no_network() -> None:
    found = load("embedded", OTHER)
    assert found.new_head
    assert len(found.chain()) > 0
    assert found.source.name == "embedded"


@pytest.mark.usefixtures("shared_data")
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224.fix_in1k", "mobilenetv2_100.tflite_quant_in1k"])
def test_real_checkpoints_split_exactly(name: str, shared_data: Path) -> None:
    found = load(str(shared_data / "checkpoints" / name))
    chain = found.chain()
    assert len(chain) == (12 if "deit" in name else 18)
    assert not chain.notes
    pixels = make_pixels(chain.image_shape, 2)
    with torch.no_grad():
        whole = compute_logits(found.model, pixels)
        cuts = [chain.cuts[0], chain.cuts[len(chain) // 2], chain.cuts[-2], chain.cuts[-1]]
        for cut, activation in zip(cuts, chain.run_prefix(cuts, pixels), strict=True):
            with chain.part(cut) as suffix:
                torch.testing.assert_close(suffix(activation), whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


def test_a_timm_checkpoint_in_transformers_clothes_is_the_timm_model(tmp_path: Path) -> None:
    model = publish_timm(tmp_path)

    def wrap(weights: dict[str, torch.Tensor]) -> None:
        renamed = {f"timm_model.{name}": value for name, value in weights.items()}
        weights.clear()
        weights.update(renamed)

    edit_weights(tmp_path, wrap)
    edit_config(tmp_path, lambda config: config.update(model_type="timm_wrapper"))
    found = load(str(tmp_path))
    assert type(found.model) is type(model)
    pixels = make_pixels(found.preprocessing.image_shape, 2)
    assert torch.equal(found.model(pixels), model(pixels))


def test_a_number_of_classes_recorded_twice_is_no_obstacle(tmp_path: Path) -> None:
    """timm 1.0.31 writes num_classes into model_args too."""
    publish_timm(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["num_classes"] == NUM_CLASSES
    assert load(str(tmp_path), OTHER).label_names == OTHER


@pytest.mark.parametrize("way", ["checkpoint_path", "pretrained_cfg_overlay", "architecture", "source"])
def test_a_config_cannot_have_timm_load_another_file(tmp_path: Path, way: str) -> None:
    model = publish_timm(tmp_path / "model")
    other = publish_timm(tmp_path / "other")
    edit_weights(tmp_path / "other", lambda weights: weights.update({n: v * 0 for n, v in weights.items()}))
    torch.save({name: torch.zeros_like(value) for name, value in other.state_dict().items()}, tmp_path / "other.pth")
    edit = {
        "checkpoint_path": {"model_args": {"checkpoint_path": str(tmp_path / "other.pth")}},
        "pretrained_cfg_overlay": {"model_args": {"pretrained_cfg_overlay": {"file": str(tmp_path / "other.pth")}}},
        "architecture": {"architecture": f"local-dir:{tmp_path / 'other'}"},
    }.get(way)
    if edit is not None:
        edit_config(tmp_path / "model", lambda config: config.update(edit))
        with pytest.raises(ValueError, match=f"model: config.json has .*{way}"):
            load(str(tmp_path / "model"))
        return
    other_source = {"source": "local-dir", "file": str(tmp_path / "other"), "custom_load": True}
    edit_config(tmp_path / "model", lambda config: config["pretrained_cfg"].update(other_source))
    pixels = make_pixels((3, 32, 32), 2)
    assert torch.equal(load(str(tmp_path / "model")).model(pixels), model(pixels))


def test_half_precision_weights_load_as_float32(tmp_path: Path) -> None:
    publish_timm(tmp_path)
    edit_weights(tmp_path, lambda w: w.update({n: v.half() for n, v in w.items() if v.ndim >= 2}))
    assert {p.dtype for p in load(str(tmp_path)).model.parameters()} == {torch.float32}


# --- where it came from -------------------------------------------------------------------------------------------------


def test_a_folder_is_known_by_its_name_unless_a_base_model_is_given(tmp_path: Path) -> None:
    folder = tmp_path / "my-checkpoint"
    publish_timm(folder)
    source = load(str(folder)).source
    assert (source.id, source.revision, source.name) == (None, None, "my-checkpoint")
    source = load(str(folder), base_model="timm/resnet18.a1_in1k").source
    assert (source.id, source.name) == ("timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k")


def test_a_folders_card_names_its_base_model_and_licence(tmp_path: Path) -> None:
    publish_timm(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: timm/resnet18.a1_in1k\n---\n# Model\n")
    source = load(str(tmp_path)).source
    assert (source.base_model, source.license) == ("timm/resnet18.a1_in1k", "mit")
    assert (source.id, source.name) == (None, tmp_path.name)  # the base's id does not name these weights


@pytest.fixture
def cached_checkpoint() -> Path:
    """The snapshot of `someone/small-net` in the Hub cache of this test session, as a download would have left it."""
    repo = Path(os.environ["HF_HOME"]) / "hub" / "models--someone--small-net"
    shutil.rmtree(repo, ignore_errors=True)
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return snapshot


@BOTH
def test_a_cached_hub_id_loads_offline_at_its_commit(publish: Publish, cached_checkpoint: Path) -> None:
    publish(cached_checkpoint)
    for name in ("someone/small-net", "someone/small-net@main", f"someone/small-net@{COMMIT}"):
        found = load(name)
        assert (found.source.id, found.source.revision) == ("someone/small-net", COMMIT)
        assert found.label_names == OWN


def test_a_cached_checkpoint_in_shards_loads_offline(cached_checkpoint: Path) -> None:
    model = make_model("ViT")
    publish_transformers(cached_checkpoint)
    (cached_checkpoint / "model.safetensors").unlink()
    assert isinstance(model, transformers.PreTrainedModel)
    model.save_pretrained(cached_checkpoint, max_shard_size="20KB")
    assert not (cached_checkpoint / "model.safetensors").exists()
    found = load("someone/small-net")
    assert all(torch.equal(v, found.model.state_dict()[n]) for n, v in model.state_dict().items())


def test_a_snapshot_folder_of_the_cache_is_known_by_its_hub_id(cached_checkpoint: Path) -> None:
    publish_timm(cached_checkpoint)
    source = load(str(cached_checkpoint)).source
    assert (source.id, source.revision) == ("someone/small-net", COMMIT)


# --- what cannot be loaded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("resnet18", "timm/resnet18.a1_in1k or timm/resnet18.a2_in1k"),
        ("resnet18.tv_in1k", "timm/resnet18.tv_in1k or timm/resnet18.a1_in1k"),
        ("resnet18.no_such_tag@main", "timm/resnet18.a1_in1k or "),
        ("mobilenetv2_100", "timm/mobilenetv2_100.ra_in1k"),
    ],
)
def test_a_name_in_timm_suggests_the_ids_on_the_hub(name: str, first: str) -> None:
    with pytest.raises(
        ValueError, match=r"is a name in timm, but neither a folder here nor a Hub id: choose "
    ) as caught:
        check_checkpoint(name)
    assert str(caught.value).partition("choose ")[2].startswith(first)


def test_a_name_that_timm_does_not_know_may_be_on_the_hub() -> None:
    check_checkpoint("gpt2")
    check_checkpoint("resnet81")


@pytest.mark.parametrize("name", ["timm/resnet18.a1_in1k", "google/vit-base-patch16-224@main", "gpt2"])
def test_a_hub_id_without_network_says_so_and_what_to_do(name: str) -> None:
    with pytest.raises(ValueError, match=r"the Hub cannot be reached .*Remedy: run `hf download") as caught:
        load(name, OTHER)
    assert name.partition("@")[0] in str(caught.value)


def test_an_unknown_revision_without_network_says_so(cached_checkpoint: Path) -> None:
    publish_timm(cached_checkpoint)
    with pytest.raises(ValueError, match="the Hub cannot be reached"):
        load("someone/small-net@v2")


@pytest.mark.parametrize("name", ["./missing", "a/b/c", "no such thing", "../up", "owner/name@"])
def test_what_is_neither_folder_nor_id_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="neither a folder here nor a Hub id"):
        load(name, OTHER)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json: give a folder in Hub layout"):
        load(str(tmp_path))


@pytest.mark.parametrize("name", ["model.pth", "tf_model.h5", "flax_model.msgpack", "model.onnx", None])
def test_weights_in_another_format_are_refused(name: str | None, tmp_path: Path) -> None:
    publish_timm(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if name is not None:
        (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(ValueError, match=rf"has none of model.safetensors, .*\(its weights: {name or 'none'}\)"):
        load(str(tmp_path))


def test_a_config_of_neither_library_is_refused(tmp_path: Path) -> None:
    publish_timm(tmp_path)
    edit_config(tmp_path, lambda config: config.pop("architecture"))
    with pytest.raises(ValueError, match="names neither a timm architecture nor a transformers model_type"):
        load(str(tmp_path))


def test_an_architecture_that_timm_does_not_know_is_refused(tmp_path: Path) -> None:
    publish_timm(tmp_path)
    edit_config(tmp_path, lambda config: config.update(architecture="resnet_of_the_future"))
    with pytest.raises(ValueError, match="resnet_of_the_future"):
        load(str(tmp_path))


def test_a_transformers_model_that_classifies_no_images_is_refused(tmp_path: Path) -> None:
    publish_transformers(tmp_path)
    edit_config(tmp_path, lambda config: config.update(model_type="bert"))
    with pytest.raises(ValueError, match="BertModel takes text; choose"):
        load(str(tmp_path), OTHER)


def test_a_checkpoint_without_preprocessing_is_refused(tmp_path: Path) -> None:
    publish_transformers(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="names no image preprocessing"):
        load(str(tmp_path))


def body_weight(weights: dict[str, torch.Tensor]) -> str:
    """A name in the file; in memory, transformers has other prefixes."""
    return next(n for n in weights if n.endswith(("layer2.0.bn1.weight", ".layernorm_before.weight")))


@BOTH
@pytest.mark.parametrize("labels", [None, OTHER])
def test_a_missing_weight_of_the_body_is_refused(
    publish: Publish, labels: tuple[str, ...] | None, tmp_path: Path
) -> None:
    publish(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.pop(body_weight(weights)))
    with pytest.raises(ValueError, match=r"layer2.0.bn1.weight|vit.layers.0.layernorm_before.weight"):
        load(str(tmp_path), labels)


@BOTH
@pytest.mark.parametrize("labels", [None, OTHER])
def test_a_weight_of_another_shape_is_refused(publish: Publish, labels: tuple[str, ...] | None, tmp_path: Path) -> None:
    publish(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({body_weight(weights): torch.zeros(9)}))
    with pytest.raises(ValueError, match=r"layer2.0.bn1.weight|vit.layers.0.layernorm_before.weight"):
        load(str(tmp_path), labels)


def remove_head(weights: dict[str, torch.Tensor]) -> None:
    for name in [n for n in weights if n.split(".")[0] in ("fc", "classifier")]:
        del weights[name]


@BOTH
def test_a_checkpoint_without_head_needs_labels(publish: Publish, tmp_path: Path) -> None:
    """As self-supervised checkpoints come: the body alone."""
    if isinstance(publish(tmp_path), transformers.PreTrainedModel):
        edit_weights(tmp_path, remove_head)
    else:
        headless = timm.create_model(
            "resnet18", num_classes=0, layers=(1, 2, 1, 1), channels=(8, 8, 16, 16), stem_width=8
        )
        timm.models.save_for_hf(headless, str(tmp_path), safe_serialization=True)
    with pytest.raises(ValueError, match="has no trained head: give labels for a new head"):
        load(str(tmp_path))
    found = load(str(tmp_path), OTHER)
    assert found.new_head
    assert found.label_names == OTHER
    assert compute_logits(found.model, make_pixels(found.preprocessing.image_shape, 2)).shape == (2, 3)


def test_a_head_that_only_the_config_names_is_new(tmp_path: Path) -> None:
    publish_transformers(tmp_path)
    assert not load(str(tmp_path), OWN).new_head
    edit_weights(tmp_path, remove_head)
    assert load(str(tmp_path), OWN).new_head


@pytest.mark.parametrize("labels", [["ant"], [], ["ant", "bee", "ant"]])
def test_labels_must_be_two_or_more_different_names(labels: list[str], tmp_path: Path) -> None:
    publish_timm(tmp_path)
    with pytest.raises(ValueError, match="labels must be two or more different names"):
        load(str(tmp_path), labels)
