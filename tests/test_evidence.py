"""One pass: features at each depth, the distance of BatchNorm statistics, and that the network is left unchanged."""

from pathlib import Path

import numpy as np
import pytest
import timm.models
import torch
from accelerate import Accelerator
from torch import nn

from hf_transfer.choosing.evidence import (
    Evidence,
    find_channel,
    gather_evidence,
    read_head,
    spread_depths,
    tap_mean,
)
from hf_transfer.choosing.forward_stats import _record_batchnorm_inputs, measure_forward
from hf_transfer.choosing.similarity import compute_label_information, measure_similarity
from hf_transfer.config import TrainConfig
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.data.options import ExtractOptions
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.chain import Chain
from tests.families import assert_same_state, built, state_of

CONFIG = TrainConfig(images_per_class=6, tracker="none")
OPTIONS = ExtractOptions(batch_size=16)
Inputs = tuple[Data, Backbone, Chain]


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    data = load_data(CONFIG)
    backbone = load("embedded", data.label_names)
    return data, backbone, backbone.chain()


def gather(inputs: Inputs, options: ExtractOptions = OPTIONS) -> Evidence:
    data, backbone, chain = inputs
    head = read_head("embedded")
    return gather_evidence(chain, backbone, data, head=head, accelerator=Accelerator(cpu=True), options=options)


def test_upstreams_predictions_are_those_of_the_whole_network(inputs: Inputs) -> None:
    """From stored features and the classifier's weights, without a second pass."""
    data, backbone, _ = inputs
    evidence = gather(inputs)
    assert evidence.upstream_logits is not None
    pixels = np.stack([backbone.preprocessing.pixels(data.train.image(i)) for i in range(4)])
    with torch.no_grad():
        whole = load("embedded").model(backbone.preprocessing.normalize(torch.from_numpy(pixels)))
    np.testing.assert_allclose(evidence.upstream_logits[:4], whole.numpy(), rtol=1e-4, atol=1e-4)
    assert evidence.labels.tolist() == [*data.train.labels, *data.validation.labels]


def test_a_checkpoint_without_head_has_no_upstream_predictions(tmp_path: Path) -> None:
    """As self-supervised checkpoints come. Any other error is the user's to see, whatever the folder is called."""
    headless = timm.create_model("resnet18", num_classes=0, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_width=8)
    timm.models.save_for_hf(headless, str(tmp_path / "body"), safe_serialization=True)
    assert read_head(str(tmp_path / "body")) is None
    broken = tmp_path / "no trained head"
    timm.models.save_for_hf(headless, str(broken), safe_serialization=True)
    (broken / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names neither"):
        read_head(str(broken))


def test_depths_are_means_over_positions(inputs: Inputs) -> None:
    data, backbone, chain = inputs
    evidence = gather(inputs)
    assert [d.is_native for d in evidence.depths] == [False] * (len(evidence.depths) - 1) + [True]
    assert [d.position for d in evidence.depths] == sorted(d.position for d in evidence.depths)
    pixels = torch.from_numpy(backbone.preprocessing.pixels(data.train.image(0)).copy())[None]
    for depth in evidence.depths[:-1]:
        (activation,) = chain.run_prefix([chain.cut(depth.layer)], backbone.preprocessing.normalize(pixels))
        np.testing.assert_allclose(depth.features[0], activation[0].mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_the_same_evidence_again_costs_no_pass(inputs: Inputs) -> None:
    gather(inputs)
    assert gather(inputs).images_computed == 0
    # Without a cache it is computed again, but in one pass for all readers.
    data = inputs[0]
    assert gather(inputs, ExtractOptions(cache="none")).images_computed == len(data.train) + len(data.validation)


@pytest.mark.parametrize("name", ["timm ResNet", "timm ViT", "timm Swin", "timm ConvNeXt"])
def test_channels_are_found_in_any_layout(name: str) -> None:
    _, chain = built(name)
    for cut, position in spread_depths(chain):
        assert 0 < position <= 1
        pixels = torch.randn(2, *chain.image_shape)
        (activation,) = chain.run_prefix([cut], pixels)
        tap = tap_mean(cut, chain.image_shape)
        kept = tap.keep(activation)
        assert tuple(kept.shape) == (2, *tap.shape)
        channel = find_channel(cut.shape, chain.image_shape) + 1
        others = [i for i in range(1, activation.ndim) if i != channel]
        torch.testing.assert_close(kept, activation.mean(others))


def test_channels_first_and_last() -> None:
    assert find_channel((64, 7, 7), (3, 224, 224)) == 0
    assert find_channel((7, 7, 64), (3, 224, 224)) == 2
    assert find_channel((64, 8, 4), (3, 256, 128)) == 0
    assert find_channel((8, 4, 64), (3, 256, 128)) == 2
    assert find_channel((197, 192), (3, 224, 224)) == 1
    assert find_channel((80,), (3, 224, 224)) == 0


def test_upstreams_own_statistics_have_distance_zero() -> None:
    """Known Gaussians: the stored statistics give 0, a shift of one standard deviation gives half a nat."""
    norm = nn.Sequential(nn.BatchNorm2d(3)).eval()
    stored = norm[0]
    stored.running_mean.copy_(torch.tensor([1.0, -2.0, 0.0]))  # type: ignore[union-attr, operator]
    stored.running_var.copy_(torch.tensor([4.0, 1.0, 9.0]))  # type: ignore[union-attr, operator]
    noise = torch.randn(64, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    noise = (noise - noise.mean((0, 2, 3), keepdim=True)) / noise.std((0, 2, 3), keepdim=True, unbiased=False)
    same = noise * torch.tensor([2.0, 1.0, 3.0])[:, None, None] + torch.tensor([1.0, -2.0, 0.0])[:, None, None]
    for shift, expected in ((0.0, 0.0), (1.0, 0.5)):
        with _record_batchnorm_inputs(norm) as moments:
            for part in (same[:40], same[40:]):
                norm(part + shift * torch.tensor([2.0, 1.0, 3.0])[:, None, None])
        assert moments.compute_distance() == pytest.approx(expected, abs=1e-4)


def test_measuring_a_forward_leaves_the_network_unchanged(inputs: Inputs) -> None:
    data, backbone, chain = inputs
    before = state_of(chain.model)
    stats = measure_forward(chain, backbone, data.train, accelerator=Accelerator(cpu=True), options=OPTIONS)
    assert_same_state(before, state_of(chain.model))
    assert stats.batchnorm_distance is not None
    assert stats.images_per_second > 0
    assert stats.training_images_per_second == stats.images_per_second
    mixed = measure_forward(
        chain, backbone, data.train, accelerator=Accelerator(cpu=True), options=OPTIONS, mixed_precision="bf16"
    )
    assert_same_state(before, state_of(chain.model))
    assert mixed.training_images_per_second not in (0.0, mixed.images_per_second)
    assert mixed.batchnorm_distance == pytest.approx(stats.batchnorm_distance)  # measured in float32 only
    assert stats.num_images <= max(8, len(data.train) / 16)


def test_digits_are_like_digits_and_noise_is_not(inputs: Inputs) -> None:
    """The embedded checkpoint was pretrained on MNIST: scikit-learn's digits are near, noise is far."""
    data, backbone, chain = inputs
    near = measure_similarity(gather(inputs))
    assert near.score > 0.5
    assert {m.name for m in near.measures} == {"confidence", "label_information", "batchnorm"}

    class Noisy:
        """The split, with noise instead of its images."""

        def __init__(self, split: object) -> None:
            self.split = split

        def __getattr__(self, name: str) -> object:
            return getattr(self.split, name)

        def __len__(self) -> int:
            return len(self.split)  # type: ignore[arg-type]

        def image(self, i: int) -> object:
            from PIL import Image

            return Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8))

    noise = measure_forward(chain, backbone, Noisy(data.train), accelerator=Accelerator(cpu=True), options=OPTIONS)  # type: ignore[arg-type]
    digits = measure_forward(chain, backbone, data.train, accelerator=Accelerator(cpu=True), options=OPTIONS)
    assert noise.batchnorm_distance is not None
    assert digits.batchnorm_distance is not None
    assert noise.batchnorm_distance > 5 * digits.batchnorm_distance


def test_label_information_is_the_share_of_entropy_explained() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    exact = np.eye(50)[labels * 3]
    assert compute_label_information(exact, labels) > 0.95
    blind = rng.dirichlet(np.ones(50), 400)
    assert compute_label_information(blind, labels) < 0.05
    half = 0.5 * exact + 0.5 * np.eye(50)[rng.integers(0, 50, 400)]
    assert (
        compute_label_information(blind, labels)
        < compute_label_information(half, labels)
        < compute_label_information(exact, labels)
    )
    # A head of a thousand classes and few images: LEEP, which scores the images that it counts on, overestimates.
    few, many = labels[:40], rng.dirichlet(np.full(1000, 0.01), 40)
    joint = np.eye(4)[few].T @ many
    leep = np.log((many * (joint / joint.sum(0))[few]).sum(1)).mean()
    assert 1 + leep / np.log(4) > 0.5
    assert compute_label_information(many, few) < 0.1
