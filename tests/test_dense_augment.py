"""Augmentation in one graph: the images of `augment`, few kernels instead of dozens of operators, nothing to wait for."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hf_transfer.capability import capability_of
from hf_transfer.config import AugmentationConfig
from hf_transfer.data.augment import augment, draw, draw_uniform
from hf_transfer.data.dense_augment import augment_densely, pack
from hf_transfer.data.image_operations import find_resolutions
from hf_transfer.network.policies import full
from hf_transfer.prefix.augmenting import compile_augmentation
from hf_transfer.training.phase import TrainPhase
from hf_transfer.training.phases import run_phases
from hf_transfer.training.steps import Steps
from tests.counting import OperatorCounter
from tests.sessions import make_session
from tests.test_augment import EVERYTHING, make_pixels

COUNT = 40
AUTO = ("none", "randaugment", "trivialaugment")
CONFIGS = [AugmentationConfig(auto_augment=auto, **more) for auto in AUTO for more in ({}, EVERYTHING)]  # type: ignore[arg-type]
# Of gray levels: float32 coordinates are rounded elsewhere, which moves them by up to 1e-6 of the square's side.
LEVELS = 0.02
ROUNDED = 0.01  # share of pixels that may differ by more where operations round to whole gray levels
Batch = tuple[torch.Tensor, NDArray[np.int64], NDArray[np.float64]]


def make_batch() -> Batch:
    sizes = np.random.default_rng(0).integers(20, 60, (COUNT, 2))
    return make_pixels(COUNT, 40), sizes, draw_uniform(0, 3, np.arange(COUNT))


@pytest.mark.parametrize("augmentation", CONFIGS, ids=repr)
def test_without_a_compiler_images_are_the_same_to_the_bit(augmentation: AugmentationConfig) -> None:
    pixels, sizes, uniform = make_batch()
    expected = augment(pixels, sizes, uniform, augmentation, height_px=24, width_px=32)
    numbers = torch.from_numpy(pack(draw(pixels, sizes, uniform, augmentation, 24, 32)))
    resolutions = find_resolutions(24, 32, augmentation.min_resolution_px)
    actual = augment_densely(pixels, numbers, augmentation, height_px=24, width_px=32, resolutions=resolutions)
    assert torch.equal(actual, expected)
    assert actual.stride() == expected.stride(), "another layout would be another graph of the network"


@pytest.mark.parametrize("augmentation", CONFIGS, ids=repr)
def test_augmentation_and_normalization_are_one_graph_without_copies_from_the_host(
    augmentation: AugmentationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other random numbers, which choose other operations, run the same graph."""
    graphs: list[torch.fx.GraphModule] = []
    compile_function = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda f, *, dynamic: compile_function(f, dynamic=dynamic, backend=backend, fullgraph=True)
    )
    torch._dynamo.reset()
    images = make_session("full").preprocessing
    transform = compile_augmentation(augmentation, images)
    pixels, sizes, _ = make_batch()
    for epoch in range(3):
        uniform = draw_uniform(0, epoch, np.arange(COUNT))
        given = (pixels, sizes, uniform, augmentation)
        actual = transform(pixels, torch.from_numpy(pack(draw(*given, images.height_px, images.width_px))))
        expected = augment(*given, height_px=images.height_px, width_px=images.width_px)
        assert torch.equal(actual, images.normalize_augmented(expected))
    assert len(graphs) == 1
    assert torch.tensor not in {node.target for node in graphs[0].graph.nodes}


def test_a_resolution_above_the_networks_own_is_an_error_before_anything_is_compiled() -> None:
    preprocessing = make_session("full").preprocessing
    with pytest.raises(ValueError, match=r"min_resolution_px=33.*choose at most 32"):
        compile_augmentation(AugmentationConfig(min_resolution_px=33), preprocessing)


def collect_inputs(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[torch.Tensor]:
    """The network's inputs in two epochs, batch by batch."""
    collected: list[torch.Tensor] = []
    accumulate = Steps._accumulate

    def watch(self: Steps, draws: Any, inputs: torch.Tensor, *rest: Any) -> Any:
        collected.append(inputs.clone())
        return accumulate(self, draws, inputs, *rest)

    with monkeypatch.context() as patches:
        patches.setattr(Steps, "_accumulate", watch)
        session = make_session("full", images_per_class=7, batch_size=9, auto_augment="randaugment", **settings)
        run_phases(session, [TrainPhase(policy=full(), epochs=2, optimization=session.gradient.optimization)])
    return collected


@pytest.mark.parametrize("class_balance", ["none", "sampler"])
def test_filled_batches_hold_the_same_images_to_the_bit(class_balance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps of 8 or 9 images; with balanced classes, images of small classes repeat within a batch."""
    plain = collect_inputs(monkeypatch, class_balance=class_balance)
    sizes: set[int] = set()

    def keep(function: Any, **_: Any) -> Any:
        def watched(*given: Any) -> Any:
            if given[0].dtype is torch.uint8:
                sizes.add(len(given[0]))
            return function(*given)

        return function if isinstance(function, torch.nn.Module) else watched

    monkeypatch.setattr(torch, "compile", keep)
    filled = collect_inputs(monkeypatch, class_balance=class_balance, compile=True, device_feed="on")
    assert [len(batch) for batch in filled] == [len(batch) for batch in plain]
    assert len({len(batch) for batch in plain}) > 1
    assert len(sizes) == 1
    for a, b in zip(plain, filled, strict=True):
        assert torch.equal(a, b)


@pytest.mark.soak
@pytest.mark.skipif(not capability_of(torch.device("cpu")).can_compile, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("augmentation", CONFIGS[::2], ids=repr)
def test_few_kernels_compute_the_same_images(augmentation: AugmentationConfig) -> None:
    from torch._inductor import metrics

    preprocessing = make_session("full").preprocessing
    pixels, sizes, uniform = make_batch()
    height_px, width_px = preprocessing.height_px, preprocessing.width_px
    with OperatorCounter() as counter:
        images = augment(pixels, sizes, uniform, augmentation, height_px=height_px, width_px=width_px)
        expected = preprocessing.normalize_augmented(images)
    numbers = torch.from_numpy(pack(draw(pixels, sizes, uniform, augmentation, height_px, width_px)))
    torch._dynamo.reset()
    metrics.reset()
    actual = compile_augmentation(augmentation, preprocessing)(pixels, numbers)
    assert metrics.generated_kernel_count < counter.calls / 4
    assert preprocessing.colors is not None
    levels = (actual - expected).abs().amax(1) * preprocessing.colors.std[0] * 255
    share = float((levels > LEVELS).float().mean())
    print(f"{counter.calls} operators, {metrics.generated_kernel_count} kernels")
    print(f"differences: at most {float(levels.max()):.2g} gray levels, above {LEVELS} in {share:.2g} of the pixels")
    assert share <= (ROUNDED if augmentation.auto_augment != "none" else 0)
