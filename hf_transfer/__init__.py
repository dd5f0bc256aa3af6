"""Fine-tune pretrained vision checkpoints for a new task, and publish models that timm, transformers or peft load.

    import hf_transfer as ht

    run = ht.Task("path/to/images", "timm/mobilenetv2_100.ra_in1k").fit(ht.lora(rank=8))

Every strategy is a function of this package: `ht.linear_probe()`, `ht.last_layers(k=2)`, `ht.full()`, ... A name's module is
imported when the name is first used, so `import hf_transfer` is fast.
"""

import importlib
import importlib.metadata
from typing import Any

from hf_transfer.startup import fast_imports
from hf_transfer.strategy import strategy_function, strategy_names

__version__ = "0.1.0"

_HOME_OF = {
    "Metrics": "metrics.records",
    "PublishOptions": "hub.publish",
    "Run": "run",
    "Target": "targets.target",
    "Task": "task",
    "evaluate": "task",
    "load_run": "run",
    "policies": "network",
    "publish": "hub.publish",
    "rank": "task",
    "register_target": "targets.target",
    "solve_head": "training.phase",
    "train": "training.phase",
}

__all__ = [*_HOME_OF, *strategy_names()]


def _refuse_old_hf_transfer() -> None:
    """Raises ImportError if PyPI's hf-transfer (a download accelerator) is installed, because its import name is the same."""
    try:
        version = importlib.metadata.version("hf-transfer")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"hf-transfer {version} (the download accelerator) is installed beside hf-transfer-learning. Both are imported as "
        "`hf_transfer`, so one environment cannot contain both. Remedy: pip uninstall hf-transfer hf-transfer-learning, then "
        "pip install hf-transfer-learning (huggingface_hub 1.0 and later do not need hf-transfer)"
    )


_refuse_old_hf_transfer()


def __getattr__(name: str) -> Any:
    if name in strategy_names():
        return strategy_function(name)
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hf_transfer' has no attribute {name!r}")
    with fast_imports():
        home = importlib.import_module(f"hf_transfer.{_HOME_OF[name]}")
        return importlib.import_module(f"hf_transfer.network.{name}") if name == "policies" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
