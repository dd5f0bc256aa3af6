"""The session of a run: all objects that the parts of one run share, from loading to saving."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_transfer.config import Engine, GradientConfig, RunConfig, StrategyConfig
from hf_transfer.costs import Costs
from hf_transfer.data.dataset import Data
from hf_transfer.locations import CHECKPOINTS
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.network.preprocessing import Preprocessing
from hf_transfer.prefix.engine_choice import decide_engine
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.prefix.resources import Resources
from hf_transfer.settings import replace_settings


def _do_nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Session:
    """The network, data, settings, processes, costs and output folder of one run.

    `output_dir` is None for a run that writes only caches.
    """

    config: RunConfig
    data: Data
    backbone: Backbone
    accelerator: Accelerator = field(default_factory=Accelerator)
    costs: Costs = field(default_factory=Costs)
    output_dir: Path | None = None
    state_name: str = ""  # subfolder of `checkpoints`; a run with several plans has one subfolder per plan
    decides_engine: bool = False  # whether the engine in `config` was decided here, and not by the user
    unrepeatable: tuple[str, ...] = ()  # sentences about inputs that config.yaml does not contain
    save_so_far: Callable[["Session", Any], None] | None = field(default=None, repr=False)
    """Saves a session's result as the best of an unfinished run, in a run folder of its own; None without an output folder."""
    note_state: Callable[[], None] = field(default=_do_nothing, repr=False)
    """Called in the main process when the state of an unfinished plan has been saved."""
    _chain: Chain | None = field(default=None, repr=False)

    @property
    def chain(self) -> Chain:
        """The chain (the network as a sequence of layers), traced and verified at the first access."""
        if self._chain is None:
            with self.costs.part("chain"):
                object.__setattr__(self, "_chain", self.backbone.chain(cache_dir=self.resources.chain_dir))
        assert self._chain is not None
        return self._chain

    def chain_of(self, backbone: Backbone) -> Chain:
        """Returns the chain of a network that was trained in this session: the session's own chain if its layers are the same.

        The same model has other layers once adapters are added or merged.
        """
        has_own_layers = backbone.model is self.backbone.model and type(backbone) is type(self.backbone)
        return self.chain if has_own_layers else backbone.chain(cache_dir=self.resources.chain_dir)

    @property
    def resources(self) -> Resources:
        """The processes, threads, memory and precision that a pass over images may use."""
        return Resources(accelerator=self.accelerator, compute=self.config.compute)

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of images that select weights and fill stores: exact, or as `decoder` says.

        The saved model, and its metrics, have `backbone.preprocessing`.
        """
        return self.backbone.preprocessing.decoded_by(
            self.config.compute.decoder, self.accelerator.device, self.costs.decoded
        )

    @property
    def strategy(self) -> StrategyConfig:
        """The settings of the strategy."""
        return self.config.strategy

    @property
    def gradient(self) -> GradientConfig:
        """The strategy, if it takes gradient steps. Raises TypeError for a strategy without gradient steps."""
        if not isinstance(self.config.strategy, GradientConfig):
            raise TypeError(f"{type(self.config.strategy).__name__} takes no gradient steps")
        return self.config.strategy

    @property
    def checkpoints(self) -> Path | None:
        """The folder of the saved training states; None if the run has no output folder."""
        return None if self.output_dir is None else self.output_dir / CHECKPOINTS / self.state_name

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which logs and writes."""
        return bool(self.accelerator.is_main_process)

    def with_network(self, backbone: Backbone, chain: Chain | None = None) -> "Session":
        """Returns the session with another network."""
        return replace(self, backbone=backbone, _chain=chain)

    def with_chain(self, chain: Chain) -> "Session":
        """Returns the session with another chain of the same network, such as the chain of one stage of greedy stacking."""
        return replace(self, _chain=chain)

    def with_strategy(self, strategy: StrategyConfig) -> "Session":
        """Returns the session with another strategy."""
        return replace(self, config=replace(self.config, strategy=strategy))

    def with_engine(self, *, stored: Engine | None = None) -> "Session":
        """Returns the session with the engine that runs the frozen network, as decided from data and network.

        `stored`: the engine of the interrupted run that this run resumes. All processes must call this method.
        """
        data, backbone = self.data, self.backbone
        splits = [split for split in (data.train, data.validation, data.test) if split is not None]
        engine = decide_engine(
            backbone.model,
            EvaluationImages(split=data.train, preprocessing=backbone.preprocessing),
            self.resources,
            image_shape=backbone.preprocessing.image_shape,
            num_images=sum(map(len, splits)),
            stored=stored,
        )
        return replace(
            self,
            config=replace_settings(self.config, {"engine": engine}),
            decides_engine=self.decides_engine or self.config.compute.engine == "auto",
        )

    def with_output(self, output_dir: Path) -> "Session":
        """Returns the session with another output folder."""
        output = replace(self.config.output, output_dir=str(output_dir))
        return replace(self, config=replace(self.config, output=output), output_dir=output_dir)

    def with_checkpoints(self, name: str) -> "Session":
        """Returns a session that saves its training states in the subfolder `name` of `checkpoints`."""
        return replace(self, state_name=name)

    def with_all_images(self) -> "Session":
        """Returns the session that trains on the pool of its train split, which has the validation images too."""
        assert self.data.train.pool is not None
        return replace(self, data=replace(self.data, train=self.data.train.pool))

    def without_test(self) -> "Session":
        """Returns the session without its test split, so that test images cannot influence the choice of a strategy."""
        return replace(self, data=replace(self.data, test=None))
