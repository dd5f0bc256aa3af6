"""The head of a network: a weighted sum of linear maps, solved as one probe and written back into the maps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
import transformers
from families import make_pixels, randomize
from sessions import make_session
from test_chain import SHAPE, Net
from test_save import LABELS, results_for
from torch import nn

from hf_transfer.choosing.evidence import gather_evidence, read_head
from hf_transfer.config import AdapterConfig, ModelConfig
from hf_transfer.hub.save import save_model
from hf_transfer.network.adapters import add_adapters, load_adapted
from hf_transfer.network.backbone import load, with_new_head
from hf_transfer.network.chain import Chain, build_chain
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.freezing import set_modes, set_trainable
from hf_transfer.network.head import read_probe, write_probe
from hf_transfer.network.policies import head
from hf_transfer.network.readout import find_readouts, read_features
from hf_transfer.network.timm_models import save_timm
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.training.phase import SolveHeadPhase
from hf_transfer.training.plan import run_plan

NUM_CLASSES = 5
_TINY_VIT = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_TINY_LEVIT = {
    "hidden_sizes": [16, 24, 32],
    "num_attention_heads": [1, 2, 2],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
}
_LEVIT = {"embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (1, 2, 2), "depth": (1, 1, 1), "img_size": 64}
_CROSSVIT = {"embed_dim": [12, 24], "depth": [[1, 1, 0]], "img_size": 48, "img_scale": (1.0, 1.0), "num_heads": [2, 2]}
DISTILLED = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}


def from_timm(architecture: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(architecture, num_classes=NUM_CLASSES, **options)


def from_transformers(family: str, suffix: str = "", **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(transformers, f"{family}Config")(num_labels=NUM_CLASSES, **options)
        model: nn.Module = getattr(transformers, f"{family}ForImageClassification{suffix}")(config)
        return model

    return build


class Mean(Net):
    """The mean of two linear maps of the same vector."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.pooled(x)
        return (self.fc(pooled) + self.second(pooled)) / 2


class Weighted(Net):
    """The sum, weighted by a trained softmax, of a map of the first layer and a map of the last, one of them without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second = nn.BatchNorm1d(4), nn.Linear(4, NUM_CLASSES, bias=False)
        self.weights = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.layers[0](x)
        last = self.layers[2](self.layers[1](first)).mean((2, 3))
        one, two = self.weights.softmax(0)
        return one * self.fc(self.norm(last)) + two * self.second(first.mean((2, 3)))


class EveryPosition(Net):
    """A linear map of every position, whose mean is the logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.flatten(2).transpose(1, 2)).mean(1)


class Branches(Net):
    """Two networks beside each other, so that no single tensor lies between the image and the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Net(width=6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (super().forward(x) + self.other(x)) / 2


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mean of two": (Mean, 8),
    "weighted sum": (Weighted, 8),
    "every position": (EveryPosition, 8),
    "branches": (Branches, 8),
    "timm distilled DeiT": (from_timm("deit_tiny_distilled_patch16_224", **DISTILLED), 32),
    "timm LeViT": (from_timm("levit_128s", **_LEVIT), 64),
    "timm CrossViT": (from_timm("crossvit_tiny_240", **_CROSSVIT), 48),
    "distilled DeiT": (from_transformers("DeiT", "WithTeacher", **_TINY_VIT), 16),
    "LeViT": (from_transformers("Levit", "WithTeacher", image_size=64, **_TINY_LEVIT), 64),
    "SwiftFormer": (from_transformers("SwiftFormer", depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16]), 64),
}
LARGER = {
    "timm EfficientFormer": (from_timm("efficientformer_l1", depths=(1, 1, 1, 2), embed_dims=(8, 8, 16, 16)), 224),
    "timm EfficientFormerV2": (from_timm("efficientformerv2_s0"), 224),
    "timm RepViT": (from_timm("repvit_m0_9", depth=(1, 1, 1, 1)), 64),
    "timm SwiftFormer": (from_timm("swiftformer_xs", layers=[1, 1, 1, 1]), 64),
    "timm EfficientViM": (from_timm("efficientvim_m1_dist"), 64),
    "timm ResNet-50 of CLIP": (from_timm("resnet50_clip"), 224),
}


def make_network(name: str) -> tuple[nn.Module, Chain]:
    build, image_px = (NETWORKS | LARGER)[name]
    torch.manual_seed(0)
    model = randomize(build()).eval()
    return model, build_chain(model, (3, image_px, image_px))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.soak) for name in LARGER)])
def test_the_logits_are_a_linear_map_of_the_features_and_a_probe_can_be_written_back(name: str) -> None:
    model, chain = make_network(name)
    (readout,) = find_readouts(chain, sweep="all")
    pixels = make_pixels(chain.image_shape, 3)
    features = read_features(readout, chain, chain.run_prefix([readout.cut], pixels)[0])
    assert features.shape == (3, readout.num_features)
    own_weight, own_bias = read_probe(model, readout.inputs)
    with torch.no_grad():
        assert relative(features @ own_weight.T + own_bias, compute_logits(model, pixels)) < 1e-5
    generator = torch.Generator().manual_seed(2)
    weight, bias = (torch.randn(NUM_CLASSES, *size, generator=generator) for size in ((readout.num_features,), ()))
    before = {n: p.clone() for n, p in model.named_parameters()}
    write_probe(model, readout.inputs, weight, bias)
    with torch.no_grad():
        assert relative(features @ weight.T + bias, compute_logits(model, pixels)) < 1e-5
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(chain.classifier_parameters) == head().select(chain)
    assert chain.head is not None
    assert {n.rpartition(".")[0] for n in changed} == set(chain.head.modules)


@pytest.mark.parametrize("name", ["mean of two", "timm distilled DeiT"])
def test_the_maps_are_found_without_gradients_too(name: str) -> None:
    model, chain = make_network(name)
    with torch.no_grad():
        again = build_chain(model, chain.image_shape)
    assert again.head == chain.head
    assert again.head is not None
    assert not again.head.is_direct


@pytest.mark.parametrize("name", ["mean of two", "weighted sum", "timm distilled DeiT", "timm LeViT"])
def test_the_part_after_the_features_computes_the_logits_and_trains_the_maps_alone(name: str) -> None:
    model, chain = make_network(name)
    pixels = make_pixels(chain.image_shape, 3)
    selected = head().select(chain)
    cut = chain.lowest_cut(selected)
    assert cut is not None
    assert cut is chain.features
    (activation,) = chain.run_prefix([cut], pixels)
    with torch.no_grad():
        whole = compute_logits(model, pixels)
    set_trainable(model, selected)
    set_modes(chain, cut, selected)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    with chain.part(cut) as part:
        logits = part(activation)
    logits.sum().backward()
    assert relative(logits.detach(), whole) < 1e-5
    assert {n for n, p in model.named_parameters() if p.grad is not None} == selected
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())  # the BatchNorm before a map is frozen


def test_maps_of_the_same_vector_share_their_features() -> None:
    model, chain = make_network("mean of two")
    (readout,) = find_readouts(chain, sweep="none")
    assert [i.modules for i in readout.inputs] == [("fc", "second")]
    assert readout.num_features == 4
    write_probe(model, readout.inputs, torch.ones(5, 4), torch.ones(5))
    assert isinstance(model, Mean)
    assert torch.equal(model.fc.weight, model.second.weight)


def test_without_a_tensor_that_all_paths_share_the_features_are_computed_from_the_image() -> None:
    _, chain = make_network("branches")
    assert chain.features is not None
    assert chain.features.shape == SHAPE
    assert chain.lowest_cut(head().select(chain)) is None  # training the head reads pixels, which are stored as uint8
    assert any("no activations can be cached" in note for note in chain.notes)


def test_shares_are_measured_again_after_training_and_are_part_of_the_cache_key() -> None:
    model, chain = make_network("weighted sum")
    assert isinstance(model, Weighted)
    (before,) = find_readouts(chain, sweep="none")
    assert chain.features is not None
    key = chain.fingerprint([chain.features])
    with torch.no_grad():
        model.weights.copy_(torch.tensor([2.0, 0.0]))
    (after,) = find_readouts(chain, sweep="none")
    assert {i.modules for i in after.inputs} == {("fc",), ("second",)}
    assert [float(i.total) for i in after.inputs] != [float(i.total) for i in before.inputs]
    assert float(sum(i.total for i in after.inputs)) == pytest.approx(1.0)
    assert chain.fingerprint([chain.features]) != key


def test_maps_that_start_at_zero_are_measured_too() -> None:
    """Their outputs are equal then, and the maximum of equal numbers has the gradients of their mean."""

    class Maximum(Mean):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pooled = self.pooled(x)
            return torch.maximum(self.fc(pooled), self.second(pooled))

    for model in (Mean(), Maximum()):
        for linear in (model.fc, model.second):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        assert (build_chain(model.eval(), SHAPE).head is None) == isinstance(model, Maximum)


def test_what_is_no_weighted_sum_is_refused_with_the_strategies_that_work() -> None:
    class Maximum(Net):  # over positions, as VOLO's second map
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.fc(x.mean((2, 3))) + 0.5 * self.aux(x.flatten(2).transpose(1, 2)).amax(1)

        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Linear(4, NUM_CLASSES)

    class Twice(Net):  # the same map of two vectors
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.layers[0](x)
            last = self.layers[2](self.layers[1](first))
            return self.fc(first.mean((2, 3))) + self.fc(last.mean((2, 3)))

    for model in (Maximum(), Twice()):
        chain = build_chain(model.eval(), SHAPE)
        assert chain.head is None
        assert chain.features is None
        assert any("no linear probe can be solved" in note for note in chain.notes)
        with pytest.raises(ValueError, match="the strategy full, or last_layers with --no-probe_first"):
            find_readouts(chain, sweep="none")


@pytest.mark.soak
def test_volo_is_refused() -> None:
    torch.manual_seed(0)
    chain = build_chain(from_timm("volo_d1_224")().eval(), (3, 224, 224))
    assert chain.head is None
    with pytest.raises(ValueError, match="VOLO: the logits are not a weighted sum"):
        find_readouts(chain, sweep="none")


def test_a_head_without_bias_is_refused_before_any_image_is_read() -> None:
    model = Net().eval()
    model.fc = nn.Linear(4, NUM_CLASSES, bias=False)
    with pytest.raises(ValueError, match="the classifier fc has no bias"):
        find_readouts(build_chain(model, SHAPE), sweep="none")


# --- a distilled checkpoint, from file to file --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilled")
    torch.manual_seed(0)
    model = randomize(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, **DISTILLED))
    timm.models.save_for_hf(
        model, str(folder), safe_serialization=True, data_config={"input_size": (3, 32, 32)}, model_args=DISTILLED
    )
    return folder


def test_a_distilled_checkpoint_is_probed_and_plain_timm_computes_the_probes_logits(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))
    session = make_session("linear_probe", checkpoint=str(checkpoint))
    result = run_plan(
        session, [SolveHeadPhase(cv_folds=2)]
    )  # compares the whole network with the probe on stored features
    assert result.metrics["test"].accuracy > 0.2  # chance is 0.1
    save_model(result.backbone, results_for(result.backbone), tmp_path / "model")
    plain = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    pixels = make_pixels((3, 32, 32), 3)
    with torch.no_grad():
        assert relative(plain(pixels), compute_logits(result.backbone.model, pixels)) < 1e-5
    assert plain.head.weight.abs().sum() > 0
    assert not torch.equal(plain.head.weight, plain.head_dist.weight)


def test_advice_predicts_what_the_distilled_checkpoints_own_head_predicts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))
    session = make_session("linear_probe", checkpoint=str(checkpoint))
    upstream_head = read_head(ModelConfig(checkpoint=str(checkpoint)), session.chain)
    evidence = gather_evidence(session, head=upstream_head, readouts=False)
    images = EvaluationImages(split=session.data.train, preprocessing=session.backbone.preprocessing)
    rows = torch.arange(4).numpy()
    pixels = images.prepare(torch.from_numpy(images.read(rows)), rows)
    with torch.no_grad():
        expected = load(str(checkpoint)).model(pixels)
    assert evidence.upstream_logits is not None
    assert relative(torch.from_numpy(evidence.upstream_logits[:4]), expected) < 1e-4


@pytest.mark.parametrize("num_classes", [4, 0])
def test_a_checkpoint_that_loses_its_distillation_classifier_is_no_base_for_plain_peft(
    num_classes: int, checkpoint: Path, tmp_path: Path
) -> None:
    # timm's RepViT drops head_dist in reset_classifier, and creates it for any number of classes.
    stages = {"embed_dim": (8, 8), "depth": (1, 1)}
    save_timm(timm.create_model("repvit_m0_9", num_classes=num_classes, **stages), tmp_path)
    found = load(str(tmp_path), LABELS)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=len(LABELS))
    assert any("head_dist" in name for name in set(plain.state_dict()) - set(found.model.state_dict()))
    assert not found.is_auto_class
    if num_classes:
        assert not with_new_head(load(str(tmp_path)), LABELS).is_auto_class
    assert load(str(checkpoint), LABELS).is_auto_class  # DeiT keeps both


def test_adapters_of_a_distilled_checkpoint_are_saved_with_both_maps_and_reloaded_by_plain_peft(
    checkpoint: Path, tmp_path: Path
) -> None:
    backbone = load(str(checkpoint), LABELS, base_model="someone/distilled")
    adapted, chain = add_adapters(backbone, backbone.chain(), AdapterConfig(method="lora"))
    assert {"head.weight", "head_dist.weight"} <= adapted.policy().select(chain)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if name in adapted.policy().select(chain):
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    pixels = make_pixels((3, 32, 32), 3)
    with torch.no_grad():
        ours = compute_logits(adapted.model.eval(), pixels)
    save_model(adapted, results_for(adapted), tmp_path / "adapter")
    base = timm.create_model(f"local-dir:{checkpoint}", pretrained=True, num_classes=len(LABELS))
    plain = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    again = load_adapted(tmp_path / "adapter", checkpoint=str(checkpoint))
    with torch.no_grad():
        assert relative(plain(pixels), ours) < 1e-5
        assert relative(again.model(pixels), ours) < 1e-5
