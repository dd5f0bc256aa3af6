"""Choose the strategy: advise, run the probe and then the advised strategy, and keep the better one.

One pass of the frozen network shows how far a probe goes, how the images compare with upstream's, and what fine-tuning is
expected to add (`hf-transfer advise` prints it). `--measure` first spends a third of the budget on short runs of the leading
strategies. The probe and the most promising strategy within the budget run, and validation images decide between them. The
settings of training hold for whichever strategy runs; those that are not given have that strategy's own defaults.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_transfer.config import flag
from hf_transfer.strategy import GradientStrategy

if TYPE_CHECKING:
    from hf_transfer.session import Session
    from hf_transfer.training.records import RunResult


@dataclass(frozen=True, kw_only=True)
class Auto(GradientStrategy):
    """Settings of the strategy that chooses."""

    budget_s: float | None = flag(None, "seconds that all runs together may take, roughly; none: no limit")
    measure: bool = flag(False, "run the leading strategies briefly before choosing")

    def __post_init__(self) -> None:
        if self.budget_s is not None and not 0 < self.budget_s < float("inf"):
            raise ValueError(f"budget_s={self.budget_s}: choose more than 0 seconds")

    def run(self, session: "Session") -> "RunResult":
        """Chooses and runs."""
        from hf_transfer.choosing.decide import choose_and_run

        return choose_and_run(session, measure=self.measure, budget_s=self.budget_s)
