"""Choose a strategy: train a linear probe and the strategy that `advise` recommends, and keep the better result.

The frozen network runs once over the images. The features show how accurate a probe is, how similar the images are to the
pretraining images, and how much fine-tuning is expected to add (`hf-transfer advise` prints these figures). With `--measure`,
short runs of the best candidates take the first third of the budget. Then the probe and the advised strategy are trained, and
validation images decide which result is kept. A training setting that the user
gives applies to every strategy. For other settings, each strategy has its own defaults.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_transfer.config import SECONDS, RunConfig
from hf_transfer.settings import flag
from hf_transfer.strategy import GradientStrategy

if TYPE_CHECKING:
    from hf_transfer.session import Session
    from hf_transfer.training.final_fit import FinalFit
    from hf_transfer.training.records import RunResult


@dataclass(frozen=True, kw_only=True)
class Auto(GradientStrategy):
    """Settings of the strategy `auto`, which chooses another strategy."""

    budget_s: float | None = flag(
        None, "approximate limit in seconds for all runs together; none: no limit", allowed=SECONDS
    )
    measure: bool = flag(False, "choose the strategy after short training runs of the best candidates")

    def check(self, config: RunConfig) -> None:
        """Raises ValueError for settings of runs that train several times, which `auto` decides."""
        super().check(config)
        repeat = config.repeat
        if repeat.folds or repeat.train_on_all:
            raise ValueError(
                f"auto: folds={repeat.folds}, train_on_all={repeat.train_on_all}: auto chooses its own folds; omit --folds and "
                "--train_on_all, or give them to the strategy that auto keeps"
            )

    def run(self, session: "Session", final: "FinalFit | None" = None) -> "RunResult":
        """Trains a linear probe and the advised strategy, and returns the better result."""
        from hf_transfer.choosing.decide import choose_and_run

        return choose_and_run(session, measure=self.measure, budget_s=self.budget_s)
