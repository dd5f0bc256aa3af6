"""How a run computes, chosen from the records of made-up machines."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from hf_transfer.capability import Capability
from hf_transfer.choices import choose
from hf_transfer.config import ComputeConfig, OptimizerConfig
from hf_transfer.prefix.sweep import use_fast_layout
from hf_transfer.training.optim import make_optimizer

CPU = Capability(
    device_type="cpu", device_name="a CPU with AMX", device_memory_bytes=None, num_cores=16, memory_bytes=2**36, has_amx=True,
    has_mps=False, has_bf16=True, has_tf32=False, has_float64=True, has_fused_optimizers=True, can_compile=True,
)  # fmt: skip
H100 = replace(CPU, device_type="cuda", device_name="a GPU", device_memory_bytes=2**36, has_amx=False, has_tf32=True)
MPS = replace(CPU, device_type="mps", device_name="mps", has_bf16=False, has_float64=False, has_fused_optimizers=False)


@pytest.mark.parametrize("capability", [CPU, H100, MPS])
def test_no_default_lowers_the_precision(capability: Capability) -> None:
    choices = choose(capability, ComputeConfig())
    assert (choices.precision, choices.tf32, choices.fused_optimizer) == ("fp32", False, False)
    assert choose(capability, ComputeConfig(), launcher_precision="bf16").precision == "bf16"
    assert choose(capability, ComputeConfig(precision="fp32"), launcher_precision="bf16").precision == "fp32"


def test_the_batch_of_frozen_layers_follows_the_device() -> None:
    assert choose(CPU, ComputeConfig(batch_size=64)).frozen_batch_size == 4
    assert choose(CPU, ComputeConfig(batch_size=2)).frozen_batch_size == 2
    assert choose(H100, ComputeConfig(batch_size=64)).frozen_batch_size == 64
    assert choose(CPU, ComputeConfig(frozen_batch_size=128)).frozen_batch_size == 128


def test_every_choice_can_be_overridden() -> None:
    on = choose(H100, ComputeConfig(tf32="on", fused_optimizer="on", channels_last="off"))
    assert (on.tf32, on.fused_optimizer, on.channels_last) == (True, True, False)
    line = (
        "cuda: fp32, contiguous convolutions, frozen layers take 32 images together, fused optimizer kernels, TF32 on"
    )
    assert on.describe() == line


@pytest.mark.parametrize(
    ("capability", "settings", "message"),
    [
        (CPU, {"tf32": "on"}, r"tf32=on: the device cpu \(a CPU with AMX\) lacks this; choose auto or off"),
        (MPS, {"fused_optimizer": "on"}, "fused_optimizer=on: the device mps"),
    ],
)
def test_what_a_device_lacks_is_refused(capability: Capability, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(capability, ComputeConfig(**settings))


def test_the_layout_and_the_fused_optimizer_reach_torch() -> None:
    model = nn.Conv2d(3, 4, 3)
    use_fast_layout(model)
    assert not model.weight.is_contiguous()
    use_fast_layout(model, channels_last=False)
    assert model.weight.is_contiguous()
    for name in ("adamw", "sgd"):
        groups = [{"params": list(model.parameters()), "lr": 1e-3, "weight_decay": 0.0}]
        optimizer = make_optimizer(groups, OptimizerConfig(optimizer=name), fused=True)
        assert optimizer.param_groups[0]["fused"] is True
    assert not make_optimizer([{"params": list(model.parameters())}], OptimizerConfig()).param_groups[0]["fused"]
    assert isinstance(optimizer, torch.optim.SGD)
