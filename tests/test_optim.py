"""Law 2: every trainable parameter is in exactly one optimizer group, with the right learning rate and weight decay."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from families import FAMILIES, built, make_model
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from hf_transfer.config import OptimizerConfig, SchedulerName
from hf_transfer.network.chain import Chain, build_chain
from hf_transfer.network.policies import biases, from_layer, full, head, last, matching, norms
from hf_transfer.training.optim import group_parameters, is_decayed, lr_factor, make_optimizer, set_lr

SCHEDULES: tuple[SchedulerName, ...] = get_args(SchedulerName)


def layer_of(chain: Chain, name: str) -> int:
    return next(i for i, layer in enumerate(chain.layers) if name in layer.parameters)


# --- groups -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_trainable_parameter_is_in_exactly_one_group_and_no_frozen_one_in_any(name: str) -> None:
    model, chain = built(name)
    optimization = OptimizerConfig(layer_decay=0.7, head_lr=1e-3)
    parameters = dict(model.named_parameters())
    for policy in (head(), last(0), last(1), from_layer("stem"), norms(), biases(), full()):
        trainable = policy.select(chain)
        groups = group_parameters(chain, trainable, optimization)
        names = [n for group in groups for n in group["names"]]
        assert len(names) == len(set(names))
        assert set(names) == trainable
        assert all(group["params"] for group in groups)
        for group in groups:
            assert [id(p) for p in group["params"]] == [id(parameters[n]) for n in group["names"]]
            assert len({layer_of(chain, n) for n in group["names"]}) == 1
        order = [layer_of(chain, group["names"][0]) for group in groups]
        assert order == sorted(order)
        assert max(order.count(i) for i in order) <= 2  # decayed and not


@pytest.mark.parametrize("name", FAMILIES)
def test_only_kernels_and_matrices_decay(name: str) -> None:
    model, chain = built(name)
    expected = {
        f"{prefix}.{own}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention)
        for own, _ in module.named_parameters(recurse=False)
        if own in ("weight", "in_proj_weight")
    }
    groups = group_parameters(chain, full().select(chain), OptimizerConfig(weight_decay=0.3))
    decayed = {n for group in groups if group["weight_decay"] for n in group["names"]}
    assert decayed == expected - set(chain.unused_parameters)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}


def test_norms_of_two_dimensions_embeddings_and_scales_do_not_decay() -> None:
    model = nn.Module()
    model.norm = nn.LayerNorm([3, 4])
    model.embedding = nn.Embedding(3, 4)
    model.pos_embed = nn.Parameter(torch.ones(1, 3, 4))
    model.relative_position_bias_table = nn.Parameter(torch.ones(9, 2))
    model.layer_scale_weight = nn.Parameter(torch.ones(1, 4, 1, 1))
    model.linear = nn.Linear(3, 4)
    assert {n for n, _ in model.named_parameters() if is_decayed(model, n)} == {"linear.weight"}


@pytest.mark.parametrize("layer_decay", [1.0, 0.65])
def test_lr_falls_by_the_same_factor_from_layer_to_layer_below_the_head(layer_decay: float) -> None:
    _, chain = built("timm ResNet")
    optimization = OptimizerConfig(lr=2e-4, head_lr=3e-3, layer_decay=layer_decay)
    groups = group_parameters(chain, full().select(chain), optimization)
    actual = {layer_of(chain, group["names"][0]): group["lr"] for group in groups}
    below = 2e-4 * np.power(layer_decay, np.arange(len(chain), -1, -1))
    np.testing.assert_allclose([actual[i] for i in range(len(chain.layers))], [*below, 3e-3], rtol=1e-12)
    assert actual[len(chain)] == 2e-4  # of the last layer below the head
    # A layer's rate does not depend on what else trains.
    some = group_parameters(chain, matching("conv1|fc").select(chain), optimization)
    assert {layer_of(chain, g["names"][0]): g["lr"] for g in some} == actual


def test_without_a_head_lr_the_head_has_the_lr() -> None:
    _, chain = built("timm ViT")
    groups = group_parameters(chain, full().select(chain), OptimizerConfig(lr=2e-4, layer_decay=0.5))
    assert {layer_of(chain, g["names"][0]): g["lr"] for g in groups} == {0: 5e-5, 1: 1e-4, 2: 2e-4, 3: 2e-4}


def test_in_a_chain_that_is_all_head_only_the_classifier_gets_the_head_lr() -> None:
    class Entangled(nn.Module):  # two parallel branches, so there is no legal cut below the classifier
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 8)
            self.second = nn.Linear(3, 8)
            self.fc = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pooled = x.mean((2, 3))
            logits: torch.Tensor = self.fc(self.first(pooled).relu() + self.second(pooled))
            return logits

    chain = build_chain(Entangled(), (3, 8, 8))
    assert not any(layer.parameters for layer in chain.layers[:-1])
    groups = group_parameters(chain, full().select(chain), OptimizerConfig(lr=1e-4, head_lr=1e-2))
    assert {n: g["lr"] for g in groups for n in g["names"]} == {
        "first.weight": 1e-4,
        "first.bias": 1e-4,
        "second.weight": 1e-4,
        "second.bias": 1e-4,
        "fc.weight": 1e-2,
        "fc.bias": 1e-2,
    }


def test_group_parameters_refuses_unknown_names_and_an_empty_set() -> None:
    _, chain = built("SigLIP")
    orphan = chain.unused_parameters[0]
    with pytest.raises(ValueError, match=f"not parameters of this chain: {orphan}"):
        group_parameters(chain, [orphan], OptimizerConfig())
    with pytest.raises(ValueError, match="no parameter trains"):
        group_parameters(chain, [], OptimizerConfig())


# --- optimizers ---------------------------------------------------------------------------------------------------------


def make_optimized(optimization: OptimizerConfig) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model("timm ViT")
    chain = build_chain(model, FAMILIES["timm ViT"].image_shape)
    return model, make_optimizer(group_parameters(chain, full().select(chain), optimization), optimization)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_each_group_moves_and_decays_by_its_own_numbers(optimizer: Any) -> None:
    optimization = OptimizerConfig(
        optimizer=optimizer, lr=1e-2, head_lr=2e-2, layer_decay=0.5, weight_decay=0.1, momentum=0.9
    )
    model, made = make_optimized(optimization)
    groups = {n: g for g in made.param_groups for n in g["names"]}
    rng = np.random.default_rng(0)
    weights = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    first = {n: np.zeros_like(w) for n, w in weights.items()}
    second = {n: np.zeros_like(w) for n, w in weights.items()}
    for step, factor in enumerate((1.0, 0.5, 0.1), start=1):
        set_lr(made, factor)
        for name, parameter in model.named_parameters():
            g = rng.standard_normal(parameter.shape)
            parameter.grad = torch.from_numpy(g).float()
            lr, decay = factor * groups[name]["initial_lr"], groups[name]["weight_decay"]
            w = weights[name]
            if optimizer == "sgd":
                g = g + decay * w
                first[name] = 0.9 * first[name] + g if step > 1 else g
                weights[name] = w - lr * (g + 0.9 * first[name])
            else:
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g**2
                slope = first[name] / (1 - 0.9**step) / (np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8)
                weights[name] = w * (1 - lr * decay) - lr * slope
        made.step()
    for name, parameter in model.named_parameters():
        # float32 against float64: a few units in the last place of weights below 4 and of steps below 0.1.
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], atol=2e-6, rtol=2e-6, err_msg=name)


def test_sgd_without_momentum_is_plain() -> None:
    _, made = make_optimized(OptimizerConfig(optimizer="sgd", momentum=0.0))
    assert {(g["momentum"], g["nesterov"]) for g in made.param_groups} == {(0.0, False)}


def test_set_lr_multiplies_the_initial_lr_through_accelerate_too() -> None:
    optimization = OptimizerConfig(layer_decay=0.5, head_lr=1e-2)
    _, made = make_optimized(optimization)
    initial = [group["lr"] for group in made.param_groups]
    wrapped = Accelerator(cpu=True).prepare_optimizer(made)
    for factor in (0.5, 0.25):  # always relative to the initial rate
        set_lr(wrapped, factor)
        assert [group["lr"] for group in made.param_groups] == [lr * factor for lr in initial]


def test_a_resumed_optimizer_keeps_its_groups() -> None:
    optimization = OptimizerConfig(layer_decay=0.5)
    model, made = make_optimized(optimization)
    set_lr(made, 0.5)
    model(torch.ones(1, 3, 32, 32)).sum().backward()
    made.step()
    _, fresh = make_optimized(optimization)
    fresh.load_state_dict(made.state_dict())
    keys = ("names", "lr", "initial_lr", "weight_decay")
    assert [[g[k] for k in keys] for g in fresh.param_groups] == [[g[k] for k in keys] for g in made.param_groups]


# --- schedules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 3, 10, 97])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
def test_factors_are_above_0_at_most_1_and_rise_then_fall(schedule: SchedulerName, total: int, warmup: float) -> None:
    factors = [
        lr_factor(i, total, OptimizerConfig(lr_scheduler_type=schedule, warmup_ratio=warmup)) for i in range(total)
    ]
    assert all(0 < f <= 1 for f in factors)
    top = min(round(warmup * total), total - 1)
    assert factors[top] == 1
    rise, fall = np.diff(factors[: top + 1]), np.diff(factors[top:])
    assert (rise > 0).all()
    assert (fall <= 0).all() if schedule == "constant" else (fall < 0).all()


def factors_of_torch(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    actual = []
    for _ in range(steps):
        actual.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return actual


def one_weight() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_cosine_and_linear_equal_transformers_after_a_warm_up_that_starts_above_0(
    schedule: SchedulerName, reference: Any
) -> None:
    total, warmup_steps = 40, 8
    optimization = OptimizerConfig(lr_scheduler_type=schedule, warmup_ratio=warmup_steps / total)
    expected = factors_of_torch(reference(one_weight(), warmup_steps, total), total)
    actual = [lr_factor(i, total, optimization) for i in range(total)]
    np.testing.assert_allclose(actual[warmup_steps:], expected[warmup_steps:], rtol=1e-12)
    np.testing.assert_allclose(actual[:warmup_steps], np.arange(1, 9) / 9, rtol=1e-12)


def test_one_cycle_equals_torch() -> None:
    total, warmup_steps = 40, 10
    reference = torch.optim.lr_scheduler.OneCycleLR(
        one_weight(),
        max_lr=1.0,
        total_steps=total,
        pct_start=(warmup_steps + 1) / total,  # torch counts the peak step as part of the rise
        div_factor=25,
        final_div_factor=1e5 / 25,  # relative to the first learning rate
        cycle_momentum=False,
    )
    optimization = OptimizerConfig(lr_scheduler_type="one_cycle", warmup_ratio=warmup_steps / total)
    actual = [lr_factor(i, total, optimization) for i in range(total)]
    np.testing.assert_allclose(actual, factors_of_torch(reference, total), rtol=1e-9)
    assert actual[0] == pytest.approx(1 / 25)
    assert actual[-1] == pytest.approx(1e-5)


def test_constant_stays_after_its_warm_up() -> None:
    optimization = OptimizerConfig(lr_scheduler_type="constant", warmup_ratio=0.3)
    assert [lr_factor(i, 10, optimization) for i in range(10)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("step", [-1, 10, 11])
def test_a_step_outside_the_phase_has_no_lr(step: int) -> None:
    with pytest.raises(ValueError, match=rf"lr_factor\(step={step}\): this phase has 10 steps; choose 0 <= step < 10"):
        lr_factor(step, 10, OptimizerConfig())


# --- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "adam"),
        ("lr_scheduler_type", "step"),
        ("lr", 0.0),
        ("lr", math.nan),
        ("head_lr", -1.0),
        ("head_lr", math.inf),
        ("layer_decay", 0.0),
        ("layer_decay", 1.1),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("momentum", 1.0),
        ("warmup_ratio", 1.0),
        ("warmup_ratio", -0.1),
    ],
)
def test_an_invalid_setting_is_refused_with_the_allowed_values(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field}='?{value}'?: choose "):
        OptimizerConfig(**{field: value})
