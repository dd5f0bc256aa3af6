"""One pass: features at each depth, the distance of BatchNorm statistics, and that the network is left unchanged."""

from dataclasses import replace
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
from hf_transfer.choosing.step_speed import measure_step_speed
from hf_transfer.config import ModelConfig, RunConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.network.backbone import load
from hf_transfer.session import Session
from hf_transfer.settings import replace_settings
from tests.families import assert_same_state, built, state_of

CONFIG = replace_settings(RunConfig(), {"images_per_class": 6, "batch_size": 16})


@pytest.fixture(scope="module")
def session() -> Session:
    data = load_data(CONFIG.data)
    backbone = load("embedded", data.label_names)
    return Session(config=CONFIG, data=data, backbone=backbone, accelerator=Accelerator(cpu=True))


def change(session: Session, **settings: object) -> Session:
    return replace(session, config=replace_settings(session.config, settings))


def gather(session: Session) -> Evidence:
    return gather_evidence(session, head=read_head(ModelConfig(), session.chain))


def test_upstreams_predictions_are_those_of_the_whole_network(session: Session) -> None:
    """From stored features and the classifier's weights, without a second pass."""
    data, backbone = session.data, session.backbone
    evidence = gather(session)
    assert evidence.upstream_logits is not None
    pixels = np.stack([backbone.preprocessing.pixels(data.train.image(i)) for i in range(4)])
    with torch.no_grad():
        whole = load("embedded").model(backbone.preprocessing.normalize(torch.from_numpy(pixels)))
    np.testing.assert_allclose(evidence.upstream_logits[:4], whole.numpy(), rtol=1e-4, atol=1e-4)
    assert evidence.labels.tolist() == [*data.train.labels, *data.validation.labels]


def test_a_checkpoint_without_head_has_no_upstream_predictions(session: Session, tmp_path: Path) -> None:
    """Self-supervised checkpoints have no head. Any other error is raised, whatever the folder is called."""
    headless = timm.create_model("resnet18", num_classes=0, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_width=8)
    timm.models.save_for_hf(headless, str(tmp_path / "body"), safe_serialization=True)
    assert read_head(ModelConfig(checkpoint=str(tmp_path / "body")), session.chain) is None
    broken = tmp_path / "no trained head"
    timm.models.save_for_hf(headless, str(broken), safe_serialization=True)
    (broken / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names neither"):
        read_head(ModelConfig(checkpoint=str(broken)), session.chain)


def test_depths_are_means_over_positions(session: Session) -> None:
    data, backbone, chain = session.data, session.backbone, session.chain
    evidence = gather(session)
    assert [d.is_native for d in evidence.depths] == [False] * (len(evidence.depths) - 1) + [True]
    assert [d.position for d in evidence.depths] == sorted(d.position for d in evidence.depths)
    pixels = torch.from_numpy(backbone.preprocessing.pixels(data.train.image(0)).copy())[None]
    for depth in evidence.depths[:-1]:
        (activation,) = chain.run_prefix([chain.cut(depth.layer)], backbone.preprocessing.normalize(pixels))
        np.testing.assert_allclose(depth.features[0], activation[0].mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_the_same_evidence_again_costs_no_pass(session: Session) -> None:
    gather(session)
    assert gather(session).images_computed == 0
    # Without a cache it is computed again, but in one pass for all readers.
    data = session.data
    assert gather(change(session, cache="none")).images_computed == len(data.train) + len(data.validation)


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


def test_measuring_a_forward_leaves_the_network_unchanged(session: Session) -> None:
    model = session.chain.model
    before = state_of(model)
    stats = measure_forward(session)
    assert_same_state(before, state_of(model))
    assert stats.batchnorm_distance is not None
    assert stats.images_per_second > 0
    assert stats.num_images <= max(8, len(session.data.train) / 16)
    in_bf16 = measure_forward(change(session, precision="bf16"))
    assert_same_state(before, state_of(model))
    assert in_bf16.images_per_second > 0
    assert in_bf16.batchnorm_distance == pytest.approx(stats.batchnorm_distance)  # recorded in float32 only


def test_speed_is_that_of_a_forward_in_the_runs_precision(session: Session) -> None:
    """The network runs under autocast once more; in fp32 it runs once, without."""
    for precision, expected in (("fp32", {torch.float32}), ("bf16", {torch.float32, torch.bfloat16})):
        seen: set[torch.dtype] = set()

        def note(_: nn.Module, inputs: object, output: torch.Tensor, seen: set[torch.dtype] = seen) -> None:
            seen.add(output.dtype)

        convolution = next(m for m in session.chain.model.modules() if isinstance(m, nn.Conv2d))
        handle = convolution.register_forward_hook(note)
        measure_forward(change(session, precision=precision))
        handle.remove()
        assert seen == expected, precision


def test_measuring_a_step_leaves_the_network_unchanged(session: Session) -> None:
    model = session.chain.model
    model.requires_grad_(False)
    model.train()
    before = state_of(model)
    assert measure_step_speed(session) > 0
    assert_same_state(before, state_of(model))
    assert model.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_digits_are_like_digits_and_noise_is_not(session: Session) -> None:
    """The embedded checkpoint was pretrained on MNIST: scikit-learn's digits are near, noise is far."""
    near = measure_similarity(gather(session))
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

        def reduced_image(self, i: int, least_px: int | None = None) -> object:
            from PIL import Image

            return Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)), (32, 32)

    noisy = replace(session.data, train=Noisy(session.data.train))  # type: ignore[arg-type]
    noise, digits = measure_forward(replace(session, data=noisy)), measure_forward(session)
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
