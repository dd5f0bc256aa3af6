"""Measures the speed of the network in training steps, from which `auto` estimates the time of its candidates.

A step decodes no images and runs more of them together than a pass over the images does, and a small network spends most of its
time between its operators. So the speed of steps does not follow from the speed of a pass.
"""

import time

import torch

from hf_transfer.network.forward import compute_logits, eval_mode
from hf_transfer.session import Session
from hf_transfer.training.pricing import FORWARDS_PER_STEP
from hf_transfer.training.steps import CPU_BATCH

ENOUGH_S = 0.5  # steps are measured for this long, one step at least


def measure_step_speed(session: Session) -> float:
    """Returns the images per second of a forward pass, if a step on all layers takes `FORWARDS_PER_STEP` times as long.

    The images are noise. Weights, gradients and running statistics of the network stay as they are.
    """
    model, resources = session.chain.model, session.resources
    batch_size = CPU_BATCH if resources.device.type == "cpu" else session.config.compute.images_per_batch
    generator = torch.Generator(resources.device).manual_seed(0)  # the global one stays as it is
    images = torch.randn(batch_size, *session.chain.image_shape, device=resources.device, generator=generator)
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(True)
    try:
        with eval_mode(model), torch.enable_grad():
            _step(session, images)  # the first step allocates memory
            count, started = 0, time.perf_counter()
            while not count or time.perf_counter() - started < ENOUGH_S:
                _step(session, images)
                count += 1
            seconds = time.perf_counter() - started
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return FORWARDS_PER_STEP * count * batch_size / seconds


def _step(session: Session, images: torch.Tensor) -> None:
    """Runs a forward and a backward pass."""
    model = session.chain.model
    with session.resources.autocast():
        logits = compute_logits(model, images)
    gradients = torch.autograd.grad(logits.float().sum(), list(model.parameters()), allow_unused=True)
    next(g for g in gradients if g is not None).sum().item()  # item() waits for the GPU
