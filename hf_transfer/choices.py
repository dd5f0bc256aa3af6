"""How a run computes on a device: one pure function from what the device can do, and from the settings, to a record.

`auto` never lowers the precision. A choice for GPUs that has not been measured on a GPU stays as torch decides (fused
optimizer) or off (TF32, device_feed), and the setting of the same name turns it on.
"""

from dataclasses import dataclass

from hf_transfer.capability import Capability
from hf_transfer.config import ComputeConfig, Precision, Switch

CPU_FROZEN_BATCH = 4  # small, so that the activations fit into the core's cache


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How a run computes."""

    device_type: str
    precision: Precision
    frozen_batch_size: int  # images that frozen layers take together
    channels_last: bool  # memory layout of convolutions
    fused_optimizer: bool  # whether one kernel updates all parameters
    tf32: bool  # whether float32 products on an NVIDIA GPU are rounded to TF32
    device_feed: bool = False  # whether training rows lie on the device, or are copied ahead of the steps

    def describe(self) -> str:
        """Returns the choices as one line, for the log and `hf-transfer doctor`."""
        layout = "channels-last" if self.channels_last else "contiguous"
        optimizer = "fused" if self.fused_optimizer else "torch's default"
        tf32 = "" if self.device_type != "cuda" else f", TF32 {'on' if self.tf32 else 'off'}"
        return (
            f"{self.device_type}: {self.precision}, {layout} convolutions, frozen layers take {self.frozen_batch_size} images "
            f"together, {optimizer} optimizer kernels{tf32}"
            f"{', training rows on the device or copied ahead' if self.device_feed else ''}"
        )


def choose(capability: Capability, compute: ComputeConfig, *, launcher_precision: Precision = "fp32") -> Choices:
    """Returns how a run with the settings `compute` computes on a device. `launcher_precision`: of `accelerate launch`.

    Raises ValueError for a setting that the device cannot follow.
    """
    is_cpu = capability.device_type == "cpu"
    _refuse_unless(capability.has_fused_optimizers, "fused_optimizer", compute.fused_optimizer, capability)
    _refuse_unless(capability.has_tf32, "tf32", compute.tf32, capability)
    return Choices(
        device_type=capability.device_type,
        precision=launcher_precision if compute.precision == "auto" else compute.precision,
        frozen_batch_size=compute.frozen_batch_size
        or (min(compute.images_per_batch, CPU_FROZEN_BATCH) if is_cpu else compute.images_per_batch),
        channels_last=compute.channels_last != "off",
        # An AdamW step of MobileNetV2 takes 0.6 % of a training step on a CPU, so a fused kernel would save nothing there.
        fused_optimizer=compute.fused_optimizer == "on",
        tf32=compute.tf32 == "on",
        device_feed=compute.device_feed == "on",
    )


def _refuse_unless(is_able: bool, name: str, value: Switch, capability: Capability) -> None:
    if value == "on" and not is_able:
        raise ValueError(
            f"{name}=on: the device {capability.device_type} ({capability.device_name}) lacks this; choose auto or off"
        )
