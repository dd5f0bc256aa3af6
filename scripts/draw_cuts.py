"""Draws docs/pictures: the cut of each strategy, and the pictures of docs/how_it_works.md.

python scripts/draw_cuts.py

Everything is read from real objects: sessions over the embedded checkpoint and data set, their chains, and the plans of the
strategies.
"""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cut_pictures import Row, draw_rows, make_row  # scripts/cut_pictures.py
from network_pictures import draw_costs, draw_graph  # scripts/network_pictures.py

from hf_transfer.choosing.candidates import AUTO
from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.network.policies import full, last
from hf_transfer.runs import open_session
from hf_transfer.session import Session
from hf_transfer.settings import replace_settings
from hf_transfer.strategies.greedy_stack import GreedyStackStrategy
from hf_transfer.strategy import Strategy, default_config
from hf_transfer.training.phase import SolveHeadPhase

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
IMAGES_PER_CLASS = 8  # the smallest set that divides into splits; images do not enter a picture


def draw_all() -> dict[str, str]:
    """Returns the SVG of each picture by its file name."""
    network = prepare("full").chain
    drawn = {
        f"{name}.svg": draw_rows(f"{name}: which layers are stored and which train", rows)
        for name, rows in list_rows().items()
    }
    idea = [make_row("last_layers --k 2: the prefix is computed once, the suffix trains ({})", network, last(2))]
    return {
        **drawn,
        "idea.svg": draw_rows("A cut divides the layers into a stored prefix and a trained suffix", idea),
        "graph.svg": draw_graph(network, "stem", "layer1.1"),
        "costs.svg": draw_costs(network),
    }


def list_rows() -> dict[str, Sequence[Row]]:
    """Returns the rows of each strategy's picture."""
    plans = {
        name: list_phases(name) for name in ("linear_probe", "last_layers", "gradual", "probe_then_full", "pretrain")
    }
    scattered = [
        ("all parameters", {}),
        ("--trains norms", {"trains": "norms"}),
        ("--trains biases", {"trains": "biases"}),
    ]
    return {
        **plans,
        "full": [row for title, given in scattered for row in list_phases("full", f"{title} ({{}})", **given)],
        "lora": [
            *list_phases("lora"),
            list_phases(
                "lora", "with --adapter_layers last:4 --cache_views 8 ({})", adapter_layers="last:4", cache_views=8
            )[1],
        ],
        "greedy_stack": list_stages(),
        "auto": list_candidates(),
    }


def list_phases(name: str, title: str = "", **settings: Any) -> list[Row]:
    """Returns a row for each phase of the strategy's plan."""
    session = prepare(name, **settings)
    strategy = session.config.strategy
    assert isinstance(strategy, Strategy)
    plan = strategy.plan(session)
    rows = []
    for i, phase in enumerate(plan, 1):
        is_solved = isinstance(phase, SolveHeadPhase)
        trained = "all layers" if phase.policy.name == full().name else phase.policy.name
        step = f"Phase {i}: " if len(plan) > 1 else ""
        step += "solve for the head" if is_solved else f"train {trained}"
        stores = is_solved or session.gradient.training.cache_views > 0
        rows.append(make_row(title or f"{step} ({{}})", session.chain, phase.policy, stores_activations=stores))
    return rows


def list_stages() -> list[Row]:
    """Returns a row for each stage of a greedy stack of new blocks, and one for the fine-tuning at the end."""
    session = prepare("greedy_stack")
    strategy = session.config.strategy
    assert isinstance(strategy, GreedyStackStrategy)
    stack = strategy.make_stack(session)
    stages = [
        make_row(f"Stage {i}: train {stage.layer} and an auxiliary head ({{}})", stage.chain, stage.policy)
        for i, stage in enumerate(stack.stages, 1)
    ]
    return [*stages, make_row("Fine-tuning: train all layers ({})", stack.chain, full())]


def list_candidates() -> list[Row]:
    """Returns a row for the probe and for the last phase of each candidate that `auto` compares with the probe."""
    rows = list_phases("linear_probe", "linear_probe ({})")
    for contender in AUTO:
        flags = "".join(f" --{key} {value:g}" for key, value in contender.settings.items())
        rows.append(list_phases(contender.strategy, f"{contender.strategy}{flags} ({{}})", **contender.settings)[-1])
    return rows


def prepare(name: str, **settings: Any) -> Session:
    """Returns a session of the strategy over the embedded checkpoint, or over the network that the strategy creates."""
    config = replace_settings(default_config(name), {"images_per_class": IMAGES_PER_CLASS, **settings})
    session = open_session(config, load=lambda: read_data(config.data))
    session.costs.stop()
    assert isinstance(config.strategy, Strategy)
    return config.strategy.prepare(session)


@cache
def read_data(config: DataConfig) -> Data:
    """Returns the splits, which are read once."""
    return load_data(config)


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for name, svg in draw_all().items():
        (PICTURES / name).write_text(svg)
    sys.stdout.write(f"wrote {len(list(PICTURES.glob('*.svg')))} pictures to docs/pictures\n")
