"""A session: everything that one run carries from its first line to its last."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import Accelerator

from hf_transfer.config import GradientConfig, RunConfig, StrategyConfig
from hf_transfer.costs import Costs
from hf_transfer.data.dataset import Data
from hf_transfer.locations import chain_dir
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.prefix.resources import Resources


@dataclass(frozen=True, kw_only=True)
class Session:
    """Network, data, settings, processes, costs and output folder of one run.

    `output_dir` is None for a run that writes nothing but caches.
    """

    config: RunConfig
    data: Data
    backbone: Backbone
    accelerator: Accelerator = field(default_factory=Accelerator)
    costs: Costs = field(default_factory=Costs)
    output_dir: Path | None = None
    state_name: str = ""  # folder below `checkpoints`, for a run with several plans
    unrepeatable: tuple[str, ...] = ()  # what config.yaml cannot repeat, in sentences, such as images in memory
    _chain: Chain | None = field(default=None, repr=False)

    @property
    def chain(self) -> Chain:
        """The network's chain, traced and verified when it is first asked for."""
        if self._chain is None:
            with self.costs.part("chain"):
                object.__setattr__(self, "_chain", self.backbone.chain(cache_dir=chain_dir()))
        assert self._chain is not None
        return self._chain

    @property
    def resources(self) -> Resources:
        """What a pass over images may use of the machine."""
        return Resources(accelerator=self.accelerator, compute=self.config.compute)

    @property
    def strategy(self) -> StrategyConfig:
        """The settings of the strategy."""
        return self.config.strategy

    @property
    def gradient(self) -> GradientConfig:
        """The settings of the strategy's gradient training. Raises TypeError for a strategy without any."""
        if not isinstance(self.config.strategy, GradientConfig):
            raise TypeError(f"{type(self.config.strategy).__name__} takes no gradient steps")
        return self.config.strategy

    @property
    def checkpoints(self) -> Path | None:
        """Where states to resume from are kept; None where nothing is written."""
        return None if self.output_dir is None else self.output_dir / "checkpoints" / self.state_name

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs and writes."""
        return bool(self.accelerator.is_main_process)

    def with_network(self, backbone: Backbone, chain: Chain | None = None) -> "Session":
        """The same session over another network."""
        return replace(self, backbone=backbone, _chain=chain)

    def with_chain(self, chain: Chain) -> "Session":
        """The same session over another chain of its network, such as one greedy stage."""
        return replace(self, _chain=chain)

    def with_strategy(self, strategy: StrategyConfig) -> "Session":
        """The same session with other settings of the strategy."""
        return replace(self, config=replace(self.config, strategy=strategy))

    def with_output(self, output_dir: Path) -> "Session":
        """The same session, written to `output_dir`."""
        output = replace(self.config.output, output_dir=str(output_dir))
        return replace(self, config=replace(self.config, output=output), output_dir=output_dir)

    def with_checkpoints(self, name: str) -> "Session":
        """The same session with its states in the folder `name` below the others."""
        return replace(self, state_name=name)

    def without_test(self) -> "Session":
        """The same session without its test split, for runs that only choose."""
        return replace(self, data=replace(self.data, test=None))
