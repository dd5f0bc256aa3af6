"""The adapter methods of `peft` that work on image classifiers, and what each takes.

Each is the identity before its first step, trains in an ordinary loop, keeps its parameters beside the map that it adapts,
and can be merged into it; the tests hold that. A method that is not here is refused.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.utils import parametrize

DEFAULT_RANK = 16
REFUSED: Mapping[str, str] = {
    "adalora": "it moves rank between layers from inside the training loop",
    "fourierft": "it is not the identity at its start, so a solved head would not fit",
    "c3a": "it is not the identity at its start, so a solved head would not fit",
    "vblora": "one bank of vectors serves all layers, so nothing below it could be cached, and it is not the identity",
}
Kind = Literal["Linear", "Conv2d", "LayerNorm"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What this package knows of one of peft's methods: its configuration, and which maps it works on."""

    config: str  # class in peft
    kinds: tuple[Kind, ...]
    options: Callable[["Adapter", Mapping[str, nn.Module]], dict[str, Any]]
    misfit: Callable[["Adapter", nn.Module], str | None] = lambda how, module: None
    has_rank: bool = True
    has_alpha: bool = False


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Which adapters, how large, on which maps of which layers."""

    method: str = "lora"
    rank: int | None = None  # block size for oft, boft and road; None: 16
    alpha: float | None = None  # the adapter's output is scaled by alpha / rank; None: rank
    targets: str = "auto"  # auto, attention, mlp, all, or a regular expression that is searched in module names
    layers: str = "all"  # or last:K
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method in REFUSED:
            raise ValueError(f"adapter={self.method!r}: {REFUSED[self.method]}; choose one of {', '.join(METHODS)}")
        if self.method not in METHODS:
            raise ValueError(f"adapter={self.method!r}: choose one of {', '.join(METHODS)}")
        if self.rank is not None and not METHODS[self.method].has_rank:
            raise ValueError(f"rank={self.rank}: {self.method} has no rank; leave it out")
        if self.alpha is not None and not METHODS[self.method].has_alpha:
            raise ValueError(f"alpha={self.alpha}: {self.method} has no scale; leave it out")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank}: choose 1 or more")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha}: choose more than 0")
        if self.layers != "all" and not re.fullmatch(r"last:[1-9]\d*", self.layers):
            raise ValueError(f"adapter_layers={self.layers!r}: choose all or last:K with K of 1 or more, last:4 say")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"targets={self.targets!r}: not attention, mlp, all, nor a regular expression: {error}"
            ) from error

    @property
    def size(self) -> int:
        """The rank, resolved."""
        return self.rank or DEFAULT_RANK

    @property
    def scale(self) -> float:
        """The alpha, resolved."""
        return self.alpha or float(self.size)

    @property
    def name(self) -> str:
        """Method and size, for logs and plans."""
        known = METHODS[self.method]
        rank = f" rank {self.size}" if known.has_rank else ""
        return f"{self.method}{rank}" + (f" alpha {self.scale:g}" if known.has_alpha else "")


def find_kind(module: nn.Module) -> Kind | None:
    """What a method may take it for; None where it is more than its type says, so that merging would change it."""
    if isinstance(module, nn.LayerNorm):
        return "LayerNorm" if module.weight is not None else None
    if parametrize.is_parametrized(module):
        return None
    if isinstance(module, nn.Linear):
        return "Linear" if type(module).forward is nn.Linear.forward else None
    if isinstance(module, nn.Conv2d):
        own = type(module)
        # Subclasses pad by themselves (Conv2dSame) or normalise their weight (StdConv2d): an added weight is not the same.
        plain = own.forward is nn.Conv2d.forward and own._conv_forward is nn.Conv2d._conv_forward
        return "Conv2d" if plain and module.padding_mode == "zeros" else None
    return None


def find_misfit(how: Adapter, module: nn.Module) -> str | None:
    """Why the method cannot take this map; None where it can."""
    method = METHODS[how.method]
    kind = find_kind(module)
    if kind not in method.kinds:
        return f"{how.method} takes {' and '.join(method.kinds)}, not {kind}"
    return method.misfit(how, module)


def _shape(module: Any) -> tuple[int, int]:
    """(rows, columns) of the map's matrix; a convolution's columns are one group's."""
    return int(module.weight.shape[0]), int(module.weight[0].numel())


def _too_large(how: Adapter, module: nn.Module) -> str | None:
    smallest = min(_shape(module))
    return f"rank {how.size} is larger than the layer ({smallest})" if how.size > smallest else None


def _fits_lora(how: Adapter, module: nn.Module) -> str | None:
    groups = getattr(module, "groups", 1)
    if how.size % groups:
        return f"rank {how.size} is not divisible by its {groups} groups"
    return _too_large(how, module)


def _fits_reflections(how: Adapter, module: nn.Module) -> str | None:
    if how.size % 2:
        return f"rank {how.size} is odd, and pairs of reflections are the identity"
    return f"{how.method} takes no grouped convolution" if getattr(module, "groups", 1) > 1 else _too_large(how, module)


def _divides_columns(how: Adapter, module: nn.Module) -> str | None:
    if getattr(module, "groups", 1) > 1:
        return f"{how.method} takes no grouped convolution"
    columns = _shape(module)[1]
    return f"block size {how.size} does not divide its {columns} inputs" if columns % how.size else None


def _divides_rows(how: Adapter, module: nn.Module) -> str | None:
    rows = _shape(module)[0]
    if how.size % 2 or rows % how.size:
        return f"block size {how.size} is odd or does not divide its {rows} outputs"
    return None


def _fits_sparse(how: Adapter, module: nn.Module) -> str | None:
    rows, columns = _shape(module)
    if how.size * (rows + columns) > rows * columns:
        return f"rank {how.size} is more numbers than the layer has ({rows} x {columns})"
    return None


def _lora(**more: Any) -> Callable[[Adapter, Mapping[str, nn.Module]], dict[str, Any]]:
    return lambda how, _: {"r": how.size, "lora_alpha": how.scale, **more}


def _scaled(how: Adapter, _: Mapping[str, nn.Module]) -> dict[str, Any]:
    return {"r": how.size, "alpha": how.scale}


def _ranked(how: Adapter, _: Mapping[str, nn.Module]) -> dict[str, Any]:
    return {"r": how.size}


_BOTH: tuple[Kind, ...] = ("Linear", "Conv2d")
_LINEAR: tuple[Kind, ...] = ("Linear",)
METHODS: Mapping[str, Method] = {
    "lora": Method(config="LoraConfig", kinds=_BOTH, options=_lora(), misfit=_fits_lora, has_alpha=True),
    "dora": Method(config="LoraConfig", kinds=_BOTH, options=_lora(use_dora=True), misfit=_fits_lora, has_alpha=True),
    "rslora": Method(
        config="LoraConfig", kinds=_BOTH, options=_lora(use_rslora=True), misfit=_fits_lora, has_alpha=True
    ),
    "pissa": Method(
        config="LoraConfig", kinds=_LINEAR, options=_lora(init_lora_weights="pissa"), misfit=_too_large, has_alpha=True
    ),
    "loha": Method(config="LoHaConfig", kinds=_BOTH, options=_scaled, misfit=_too_large, has_alpha=True),
    "lokr": Method(config="LoKrConfig", kinds=_BOTH, options=_scaled, misfit=_too_large, has_alpha=True),
    "ia3": Method(config="IA3Config", kinds=_BOTH, options=lambda how, _: {"feedforward_modules": []}, has_rank=False),
    "oft": Method(
        config="OFTConfig",
        kinds=_LINEAR,
        options=lambda how, _: {"oft_block_size": how.size},
        misfit=_divides_columns,
    ),
    "boft": Method(
        config="BOFTConfig",
        kinds=_BOTH,
        options=lambda how, _: {"boft_block_size": how.size, "boft_n_butterfly_factor": 1},
        misfit=_divides_columns,
    ),
    "hra": Method(config="HRAConfig", kinds=_BOTH, options=_ranked, misfit=_fits_reflections),
    "vera": Method(config="VeraConfig", kinds=_LINEAR, options=_ranked, misfit=_too_large),
    "randlora": Method(
        config="RandLoraConfig",
        kinds=_LINEAR,
        options=lambda how, _: {"r": how.size, "randlora_alpha": how.scale},
        misfit=_too_large,
        has_alpha=True,
    ),
    "miss": Method(config="MissConfig", kinds=_LINEAR, options=_ranked, misfit=_too_large),
    "shira": Method(
        config="ShiraConfig",
        kinds=_LINEAR,
        options=lambda how, _: {"r": how.size, "random_seed": how.seed},
        misfit=_fits_sparse,
    ),
    "road": Method(
        config="RoadConfig", kinds=_LINEAR, options=lambda how, _: {"group_size": how.size}, misfit=_divides_rows
    ),
    "delora": Method(config="DeloraConfig", kinds=_LINEAR, options=_ranked, misfit=_too_large),
    "waveft": Method(
        config="WaveFTConfig",
        kinds=_LINEAR,
        options=lambda how, targets: {
            "n_frequency_pattern": {n: how.size * sum(_shape(m)) for n, m in targets.items()}
        },
        misfit=_fits_sparse,
    ),
    "ln_tuning": Method(config="LNTuningConfig", kinds=("LayerNorm",), options=lambda how, _: {}, has_rank=False),
}
