"""Choose a strategy: compare others with a linear probe on held-out images, and train the best on all images.

The frozen network runs once over the images. The features show how accurate a probe is and how similar the images are to the
pretraining images (`hf-transfer advise` prints both). From these follows how much each candidate is expected to add; of plain
`probe_then_full`, `advise` expects something else, by a table of its own. Then each candidate is trained without a part of the
images, and compared with the probe on that part: folds of few images, the validation split of many. The expected and the
measured gain together decide. The best candidate is trained again on train and validation images. A training setting with
another value than its default applies to every candidate. Other settings are those of the candidate.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hf_transfer.config import SECONDS, RunConfig, TrainingConfig
from hf_transfer.settings import flag
from hf_transfer.strategy import GradientStrategy

if TYPE_CHECKING:
    from hf_transfer.session import Session
    from hf_transfer.training.final_fit import FinalFit
    from hf_transfer.training.records import RunResult

# Settings by which validation images choose the weights.
SELECTING = ("select_by", "wise_ft", "early_stopping_patience")


@dataclass(frozen=True, kw_only=True)
class Auto(GradientStrategy):
    """Settings of the strategy `auto`, which chooses another strategy."""

    can_scale_lr: ClassVar[bool] = False  # each candidate has learning rates of its own
    refused: ClassVar[frozenset[str]] = frozenset({*SELECTING, "folds", "train_on_all"})

    budget_s: float | None = flag(
        None,
        "approximate limit in seconds for all runs together; none: no limit",
        allowed=SECONDS,
    )

    def check(self, config: RunConfig) -> None:
        """Raises ValueError for settings that contradict how `auto` trains: several times, and always to the last epoch."""
        super().check(config)
        repeat = config.repeat
        if repeat.folds or repeat.train_on_all:
            raise ValueError(
                f"auto: folds={repeat.folds}, train_on_all={repeat.train_on_all}: auto chooses its own folds; omit --folds and "
                "--train_on_all, or give them to the strategy that auto keeps"
            )
        if repeat.seeds > 1 and self.budget_s is not None:
            raise ValueError(
                f"auto: seeds={repeat.seeds}, budget_s={self.budget_s:g}: what fits into a budget depends on the speed of the "
                "machine, so seeds would not be alike; omit --budget_s or --seeds"
            )
        for name in SELECTING:
            value = getattr(self.training, name)
            if value != getattr(TrainingConfig(), name):
                raise ValueError(
                    f"auto: {name}={value}: the images that compare the strategies must not choose weights too; omit --{name}, "
                    "or give it to the strategy that auto keeps"
                )

    def run(self, session: "Session", final: "FinalFit | None" = None) -> "RunResult":
        """Trains a linear probe and the candidates, and returns the best result."""
        from hf_transfer.choosing.decide import choose_and_run

        return choose_and_run(session, budget_s=self.budget_s)
