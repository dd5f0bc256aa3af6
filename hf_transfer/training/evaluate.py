"""Computes the logits of all images of a data split, from stored activations or pixels, with any number of processes."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hf_transfer.config import Engine
from hf_transfer.data.splits import Split
from hf_transfer.metrics.records import Metrics
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.head import HeadInput
from hf_transfer.prefix.engine_choice import limit_engine
from hf_transfer.prefix.engines import ModuleRunner
from hf_transfer.prefix.pixels import EvaluationImages, Images
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.store import Store
from hf_transfer.prefix.sweep import place_model, prepare_for, read_pixels, sweep, to_fast_layout
from hf_transfer.prefix.taps import Logits, LogitsAndFeatures
from hf_transfer.processes import run_on_main
from hf_transfer.session import Session
from hf_transfer.solvers.groups import number_groups
from hf_transfer.training.gather import gather_rows
from hf_transfer.training.padding import run_padded

log = logging.getLogger(__name__)

AGREEING_IMAGES, AGREEING_LOG_LOSS = 64, 1e-3
# An engine must save more than the check costs. For MobileNetV2, `folded` with its check takes less CPU time than eager from
# about 600 images on (docs/speed.md), of which the rule in `engine_choice` counts about 80 for its preparation.
IMAGES_FOR_CHECK = 8 * AGREEING_IMAGES

LogitRows = NDArray[np.float32]
"""Logits (N, K) of all images in their order, on every process."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The metrics of a network on one split, and the logits (N, K) that gave them, in the order of the split."""

    metrics: Metrics
    logits: NDArray[np.float32]


def compute_stored_logits(
    network: Callable[[torch.Tensor], torch.Tensor],
    store: Store,
    resources: Resources,
    *,
    batch_size: int = 1024,
    pads: bool = False,
) -> LogitRows:
    """Returns the logits that `network` computes from a store of activations (N, ...).

    `network` is a head, or the part of the network after a cut: it maps activations (b, ...) on the device to logits (b, K).
    Each process computes a contiguous share of the rows, and no image counts twice. `pads`: whether all batches get the same
    number of rows, for a compiled network; the outputs of added rows are dropped.
    """
    share = _take_share(len(store), resources)
    num_rows = min(batch_size, len(share)) if pads else None
    parts = []
    with torch.no_grad():
        for i in range(0, len(share), batch_size):
            activations = torch.from_numpy(store[share[i : i + batch_size]]).to(resources.device)
            logits = run_padded(network, to_fast_layout(activations, resources), num_rows)
            parts.append(logits.float().cpu().numpy())
    return _gather_shares(parts, len(store), resources)


def compute_compiled_logits(
    network: Callable[[torch.Tensor], torch.Tensor],
    images: Images,
    resources: Resources,
    *,
    batch_size: int,
) -> LogitRows:
    """Returns the logits of a compiled network, which maps images (b, C, H, W) to logits (b, K), in the run's precision.

    All batches of a process get the same number of rows, so that the network has one graph.
    """
    share = _take_share(len(images), resources)
    num_rows, start = max(1, min(batch_size, len(share))), 0
    parts: list[torch.Tensor] = []  # on the device, which need not wait for a copy of each batch
    with torch.no_grad(), resources.autocast():
        for pixels in read_pixels(images, share, batch_size=num_rows, num_workers=resources.compute.num_workers):
            rows = share[start : start + len(pixels)]
            inputs = images.prepare(torch.from_numpy(pixels).to(resources.device, non_blocking=True), rows)
            parts.append(run_padded(network, inputs, num_rows).float())
            start += len(pixels)
    return _gather_shares([part.cpu().numpy() for part in parts], len(images), resources)


def compute_image_logits(
    model: nn.Module,
    images: Images,
    resources: Resources,
    *,
    shows_progress: bool = True,
    engine: Engine = "eager",
) -> LogitRows:
    """Returns the logits of the whole network in eval mode for `images`, in the precision of `resources`.

    Engines run frozen networks: while a network trains, `engine` must be "eager".
    """
    title = f"{images.name} images" if shows_progress else None
    (logits,) = _run_on_images(Logits(model), images, resources, engine=engine, title=title)
    return logits


def compute_logits_and_features(
    model: nn.Module, inputs: Sequence[HeadInput], images: Images, resources: Resources, *, engine: Engine = "eager"
) -> tuple[LogitRows, NDArray[np.float32]]:
    """Returns the logits (N, K) of a frozen network for `images`, and the features (N, F) of the inputs of its head."""
    module = LogitsAndFeatures(model, inputs) if inputs else Logits(model)
    logits, *features = _run_on_images(module, images, resources, engine=engine, title=f"{images.name} images")
    return logits, features[0] if features else np.zeros((len(logits), 0), np.float32)


def _run_on_images(
    module: Logits, images: Images, resources: Resources, *, engine: Engine, title: str | None
) -> list[NDArray[np.float32]]:
    """Returns each of the values (N, ...) that `module` computes, on every process."""
    share = _take_share(len(images), resources)
    batches: dict[int, list[NDArray[np.float32]]] = {}

    def write(start: int, values: list[torch.Tensor]) -> None:
        batches[start] = [value.cpu().numpy() for value in values]

    place_model(module.model, resources)
    runner = prepare_for(module, images, share, engine, resources)
    sweep(runner, images, share, write, resources, title=title)
    in_order = [batches[start] for start in sorted(batches)]
    return [_gather_shares([batch[i] for batch in in_order], len(images), resources) for i in range(module.num_values)]


def compute_checked_logits(
    model: nn.Module, images: EvaluationImages, resources: Resources, engine: Engine
) -> LogitRows:
    """Returns the logits of the whole network by `engine` if they agree with eager fp32 on some images, else by eager fp32."""
    logits = compute_image_logits(model, images, resources, engine=engine)
    if engine == "eager" or agrees_with_eager(logits, model, images, resources):
        return logits
    log.warning(
        "the predictions of engine %s differ from those of the saved model: computing the metrics again with eager",
        engine,
    )
    return compute_image_logits(model, images, resources.in_fp32())


def score_images(backbone: Backbone, split: Split, session: Session) -> Scored:
    """Scores the whole network on a data split, in fp32. The images of the split are read from files."""
    return _score(backbone.model, EvaluationImages(split=split, preprocessing=backbone.preprocessing), session)


def score_splits(
    session: Session,
    *,
    stored: EvaluationImages | None = None,
    validation_logits: LogitRows | None = None,
    scores_validation: bool = True,
) -> dict[str, Scored]:
    """Scores the whole network on the validation split and, if there is a test split, on the test split.

    `stored`: the validation images with stored pixels, which are read if they are the published pixels. `validation_logits`:
    logits (N, K) of all validation images that training computed with the final weights. They are scored if they agree with
    the network in eager fp32, so that no layer runs on all validation images again.
    """
    published, scored = session.backbone.preprocessing, dict[str, Scored]()
    for split in (session.data.validation if scores_validation else None, session.data.test):
        if split is not None:
            is_stored = stored is not None and stored.split is split and stored.preprocessing is published
            images = stored if is_stored else EvaluationImages(split=split, preprocessing=published)
            assert images is not None
            logits = validation_logits if split is session.data.validation else None
            scored[split.name] = _score(session.chain.model, images, session, logits)
    return scored


def _score(model: nn.Module, images: EvaluationImages, session: Session, logits: LogitRows | None = None) -> Scored:
    """Scores the whole network on `images`, from `logits` (N, K) if they agree with the network.

    Metrics are always measured in fp32, because the saved weights are fp32 and users load them so, whatever the precision of
    the run. The run's engine computes missing logits, if there are enough images to prepare the engine for.
    """
    split, resources = images.split, session.resources.in_fp32()
    if logits is not None and not agrees_with_eager(logits, model, images, resources):
        log.warning(
            "the %s logits of the last epoch differ from those of the saved network: computing the metrics again",
            split.name,
        )
        logits = None
    if logits is None:
        engine = limit_engine(
            resources.engine,
            model,
            resources,
            image_shape=images.preprocessing.image_shape,
            num_images=max(0, len(images) - IMAGES_FOR_CHECK),
        )
        logits = compute_checked_logits(model, images, resources, engine)
    metrics = split.target.measure(logits, split.labels, groups=number_groups([split]), seed=session.config.seed)
    return Scored(metrics=metrics, logits=logits)


def agrees_with_eager(logits: LogitRows, model: nn.Module, images: EvaluationImages, resources: Resources) -> bool:
    """Whether `logits` (N, K) of the images agree with eager fp32 on AGREEING_IMAGES images, which are read from files.

    They must agree in every decision, such as the predicted class, and in the loss within AGREEING_LOG_LOSS. The answer is the
    same on every process.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, AGREEING_IMAGES).astype(int))

    def compare() -> bool:
        exact = compute_exact_logits(model, replace(images, store=None), rows, resources)
        return agrees(torch.from_numpy(logits[rows]), exact, images.split.select(rows))

    return run_on_main(compare)


def compute_exact_logits(
    model: nn.Module, images: Images, rows: NDArray[np.int64], resources: Resources
) -> torch.Tensor:
    """Returns the logits (B, K) of the images `rows` by eager in fp32, on the CPU."""
    place_model(model, resources)
    logits: list[torch.Tensor] = [torch.empty(0)] * len(rows)

    def write(start: int, values: list[torch.Tensor]) -> None:
        logits[start : start + len(values[0])] = list(values[0].cpu())

    sweep(ModuleRunner(module=Logits(model), autocast=nullcontext), images, rows, write, resources)
    return torch.stack(logits)


def agrees(logits: torch.Tensor, exact: torch.Tensor, split: Split) -> bool:
    """Whether logits (B, K) decide as `exact`, and the mean loss agrees within AGREEING_LOG_LOSS, times the loss if above 1."""
    target, labels = split.target, torch.from_numpy(split.labels)
    loss, exact_loss = (float(target.losses(each, labels).nanmean()) for each in (logits, exact))
    agrees_in_loss = abs(loss - exact_loss) <= AGREEING_LOG_LOSS * max(1.0, abs(exact_loss))
    return target.decides_alike(logits, exact) and agrees_in_loss


def _take_share(count: int, resources: Resources) -> NDArray[np.int64]:
    """Returns the rows of this process, which follow those of the processes before it."""
    accelerator = resources.accelerator
    share: NDArray[np.int64] = np.array_split(np.arange(count), accelerator.num_processes)[accelerator.process_index]
    return share


def _gather_shares(batches: Sequence[NDArray[np.float32]], count: int, resources: Resources) -> NDArray[np.float32]:
    """Returns the rows (count, K) of all processes in order, from the batches (b, K) of this process's share.

    Raises ValueError on all processes if there is not one row per image.
    """
    own = np.concatenate(batches) if batches else np.zeros((0, 0), np.float32)
    rows = gather_rows(resources.accelerator, own)
    if len(rows) != count:
        raise ValueError(f"the network gives {len(rows)} rows for {count} images: it must give one per image")
    return rows
