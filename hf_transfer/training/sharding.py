"""Divides the trained part of a network among the processes (FSDP2), while the network itself stays plain.

`torch.distributed.fsdp.fully_shard` turns parameters into shards (DTensors) and cannot turn them back. So a phase trains a
sharded copy of the network (see `Shards`), and the copy's weights are copied back into the plain network, which validates,
audits and saves as in any other run. The frozen prefix is never sharded: the copy shares its tensors with the plain network.
With each parameter, a process has one plain copy, and 1/n of its gradient and of the optimizer's state.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from hf_transfer.config import GradientConfig, StrategyConfig
from hf_transfer.network.chain import HEAD, STEM, Chain
from hf_transfer.network.cut import Cut

SHARD_ON_CPU = "HF_TRANSFER_SHARD_ON_CPU"  # for tests, since Accelerate ignores FSDP on a CPU; 1: shard over gloo


def uses_shards(accelerator: Accelerator) -> bool:
    """Whether phases train sharded parameters: with Accelerate's FSDP2. Raises ValueError for FSDP1, and for fp16."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.num_processes > 1 and os.environ.get(SHARD_ON_CPU) == "1"
    if not accelerator.is_fsdp2:
        raise ValueError(
            "fsdp_version 1: this package shards with FSDP2 only: set fsdp_version: 2 in accelerate's config file"
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError("precision fp16 with FSDP2: choose --precision bf16 or --precision fp32")
    return True


def prepare_sharding(strategy: StrategyConfig) -> None:
    """Checks that phases of `strategy` can be sharded, before anything is loaded. Raises ValueError with --compile."""
    if isinstance(strategy, GradientConfig) and strategy.training.compile:
        raise ValueError("compile=True with FSDP2: sharded networks cannot be compiled: omit --compile")
    # Otherwise transformers loads the weights in one process only. Every process runs the frozen prefix.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


class Shards:
    """A sharded copy of the layers after `cut`, for training. `chain` is the chain of the copy, `plain` the plain network's.

    Of tensors that are not sharded (the prefix, and all buffers), copy and plain network share the memory.
    """

    def __init__(self, plain: Chain, cut: Cut | None, device: torch.device) -> None:
        prefix = set(plain.before(cut)[0])
        self.names = [n for layer in plain.layers for n in layer.parameters if n not in prefix]
        self.plain = plain
        self.chain = _copy(plain, self.names)
        self._root = shard(self.chain, self.names, init_device_mesh(device.type, (torch.distributed.get_world_size(),)))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Adds up gradients in this process, without communication, in the `with` block."""
        self._root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)

    @torch.no_grad()
    def copy_back(self) -> None:
        """Copies the weights of all processes' shards into the plain network. All processes must call this method."""
        plain = dict(self.plain.model.named_parameters())
        sharded = dict(self.chain.model.named_parameters())
        for name in self.names:
            plain[name].copy_(gather(sharded[name]))


def shard(chain: Chain, names: Collection[str], mesh: DeviceMesh) -> FSDPModule:
    """Divides the parameters `names` of the chain's model among the processes of `mesh`, in place. Returns the model.

    Each layer is a unit whose parameters are gathered and freed together. The rest (stem and head) is one more unit.
    """
    model = chain.model
    ignored = {p for n, p in model.named_parameters() if n not in set(names)}
    modules = dict(model.named_modules())
    for layer in chain.layers:
        if layer.name not in (STEM, HEAD) and not set(names).isdisjoint(layer.parameters) and layer.name in modules:
            fully_shard(modules[layer.name], mesh=mesh, ignored_params=ignored)
    return fully_shard(model, mesh=mesh, ignored_params=ignored)


def gather(state: Any) -> Any:
    """Returns a nested structure with whole tensors in place of shards. All processes must call this function."""
    return tree_map_only(DTensor, lambda tensor: tensor.full_tensor(), state)


def split_like(state: Mapping[str, torch.Tensor], sharded: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns whole tensors, with this process's shards in place of those that are shards in `sharded`."""
    return {name: _split(tensor, sharded[name]) for name, tensor in state.items()}


def _split(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return tensor
    # Without a source rank, every process takes its shard of its own whole tensor, without communication.
    return distribute_tensor(tensor.to(like.device).contiguous(), like.device_mesh, like.placements, src_data_rank=None)


def _copy(plain: Chain, names: Collection[str]) -> Chain:
    """Returns a copy of the chain whose parameters `names` have memory of their own, in the layout that FSDP2 needs."""
    chain = plain.replicate()
    copied = {
        p: nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format), p.requires_grad)
        for n, p in chain.model.named_parameters()
        if n in set(names)
    }
    for module in chain.model.modules():
        for name, parameter in module._parameters.items():
            if parameter in copied:
                module._parameters[name] = copied[parameter]
    return chain
