"""Law 3: frozen is frozen. Weights get no gradient, modules stay in eval, and whatever moves in spite of it is found."""

from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import xxhash
from families import FAMILIES, built, make_model, make_pixels, randomize
from torch import nn
from transformers import DINOv3ViTConfig

from hf_transfer.network.chain import Chain, build_chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.fingerprint import update_hash
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.freezing import Audit, FrozenChangedError, set_modes, set_trainable
from hf_transfer.network.modeling_backbone import BackboneConfig, BackboneForImageClassification
from hf_transfer.network.policies import biases, full, head, last, matching, norms
from tests.headless import LAYOUTS


def make(name: str) -> tuple[nn.Module, Chain]:
    model = make_model(name)
    return model, build_chain(model, FAMILIES[name].image_shape)


class Block(nn.Module):
    """A residual block with a BatchNorm that has no parameters, a constant outside the state_dict, and a dropout."""

    def __init__(self, dropout: nn.Dropout) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.plain_norm = nn.BatchNorm2d(4, affine=False)
        self.dropout = dropout
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.register_buffer("gain", torch.full((), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.second(self.dropout(self.plain_norm(self.first(x)).relu()))
        return x + self.gain * inner


class Net(nn.Module):
    """Three blocks; one dropout, registered once, is called in all of them (`shared`)."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        one = nn.Dropout(0.5)
        self.stem_conv = nn.Conv2d(3, 4, 3, stride=2)
        self.blocks = nn.Sequential(*(Block(one if shared else nn.Dropout(0.5)) for _ in range(3)))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.blocks(self.stem_conv(x)).mean((2, 3)))
        return logits


def make_net(*, shared: bool = False) -> tuple[Net, Chain]:
    torch.manual_seed(0)
    model = Net(shared=shared).eval()
    chain = build_chain(model, (3, 16, 16))
    assert [layer.name for layer in chain.layers] == ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]
    return model, chain


# --- weights ------------------------------------------------------------------------------------------------------------


def test_set_trainable_freezes_all_others_and_orphans() -> None:
    model, chain = make("SigLIP")
    set_trainable(model, full().select(chain))
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(chain.unused_parameters)
    assert set(chain.unused_parameters) <= model.state_dict().keys()
    set_trainable(model, head().select(chain))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}


def test_set_trainable_refuses_an_unknown_name() -> None:
    model = make_model("timm ViT")
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"not parameters of this model: head\.scale"):
        set_trainable(model, ["head.weight", "head.scale"])
    assert flags == [p.requires_grad for p in model.parameters()]


# --- modes --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def restored() -> Iterator[Callable[[str], tuple[nn.Module, Chain]]]:
    """`built`, put back into eval mode after."""
    used: list[nn.Module] = []

    def take(name: str) -> tuple[nn.Module, Chain]:
        model, chain = built(name)
        used.append(model)
        return model, chain

    yield take
    for model in used:
        model.eval()


def leaves_called(model: nn.Module, forward: Callable[[], object]) -> set[str]:
    """Names of the modules without children that finish a call in `forward`."""
    called = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    forward()
    for handle in handles:
        handle.remove()
    return called


@pytest.mark.parametrize("name", FAMILIES)
def test_what_runs_before_the_cut_is_in_eval_and_what_runs_behind_it_in_train(
    name: str, restored: Callable[[str], tuple[nn.Module, Chain]]
) -> None:
    model, chain = restored(name)
    pixels = make_pixels(chain.image_shape, 2)
    for policy in (head(), last(1), last(len(chain))):
        trainable = policy.select(chain)
        cut = chain.lowest_cut(trainable)
        assert cut is not None
        model.eval()
        before = leaves_called(model, lambda cut=cut: chain.run_prefix([cut], pixels))
        with torch.no_grad():
            behind = leaves_called(model, lambda: compute_logits(model, pixels)) - before
        set_modes(chain, cut, trainable)
        assert before
        assert behind
        assert {n for n in before if model.get_submodule(n).training} == set()
        assert {n for n in behind if not model.get_submodule(n).training} == set()
        assert model.training


def dinov3(library: str) -> nn.Module:
    """A DINOv3 whose positions are rescaled at random in train mode, by a module without parameters."""
    torch.manual_seed(0)
    if library == "timm":
        sizes = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "rope_rescale_coords": 2.0}
        model: nn.Module = timm.create_model("vit_small_patch16_dinov3", num_classes=5, **sizes)
    else:
        layout = LAYOUTS["DINOv3"]
        settings = {"pos_embed_rescale": 2.0, "pos_embed_jitter": None, **layout.settings}
        tower = DINOv3ViTConfig(**settings)
        backbone = {
            "module": "transformers.models.dinov3_vit.modeling_dinov3_vit", "class": layout.model,
            "config": tower.to_dict(), "arguments": {},
        }  # fmt: skip
        config = BackboneConfig(backbone=backbone, num_features=32, num_labels=5)
        model = BackboneForImageClassification(config)
    randomize(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4 if parameter.ndim == 2 else 1  # else attention hardly depends on positions
    return model.eval()


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_frozen_positions_are_not_drawn_at_random(library: str) -> None:
    """Law 4: the part after the cut uses the positions that the stored activations were computed with."""
    model = dinov3(library)
    chain = build_chain(model, (3, 32, 32))
    trainable = last(1).select(chain)
    cut = chain.lowest_cut(trainable)
    assert cut is not None
    pixels = make_pixels(chain.image_shape, 2)
    whole = compute_logits(model, pixels).detach()
    model.train()
    assert not torch.equal(compute_logits(model, pixels), compute_logits(model, pixels))  # at random in train mode
    set_modes(chain, cut, trainable)
    (stored,) = chain.run_prefix([cut], pixels)
    with chain.part(cut) as suffix:
        torch.testing.assert_close(suffix(stored), whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
    set_modes(chain, None, full().select(chain))
    assert not torch.equal(
        compute_logits(model, pixels), compute_logits(model, pixels)
    )  # what trains keeps its augmentation


def norms_by_mode(model: nn.Module) -> tuple[set[str], set[str]]:
    found: tuple[set[str], set[str]] = (set(), set())
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            found[module.training].add(name)
    return found


def test_batchnorm_stays_in_eval_where_neither_scale_nor_shift_trains() -> None:
    model, chain = make("timm ResNet")
    everything = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    trainable = matching(r"layer1\.0\.(conv1|bn1)|layer3\.0\.bn2\.bias").select(chain)
    set_modes(chain, chain.lowest_cut(trainable), trainable)
    frozen, training = norms_by_mode(model)
    assert training == {"layer1.0.bn1", "layer3.0.bn2"}
    assert frozen == everything - training

    trainable = full().select(chain)
    set_modes(chain, chain.lowest_cut(trainable), trainable)
    assert norms_by_mode(model) == (set(), everything)
    set_modes(chain, chain.lowest_cut(trainable), trainable, freeze_batchnorm=True)
    assert norms_by_mode(model) == (everything, set())
    assert model.layer4[0].act1.training


def test_a_frozen_batchnorm_leaves_the_modules_inside_it_in_train() -> None:
    model, chain = make("timm MobileNetV2")  # timm's BatchNormAct2d holds its dropout and its activation
    set_modes(chain, None, full().select(chain), freeze_batchnorm=True)
    norm = model.blocks[2][0].bn1
    assert isinstance(norm, nn.BatchNorm2d)
    assert not norm.training
    assert [child.training for child in norm.children()] == [True, True]


def test_batchnorm_without_parameters_follows_the_cut() -> None:
    model, chain = make_net()
    trainable = last(1).select(chain)
    cut = chain.lowest_cut(trainable)
    assert cut is chain.cut("blocks.1")
    set_modes(chain, cut, trainable)
    assert [block.plain_norm.training for block in model.blocks] == [False, False, True]
    assert [block.dropout.training for block in model.blocks] == [False, False, True]
    set_modes(chain, cut, trainable, freeze_batchnorm=True)
    assert [block.plain_norm.training for block in model.blocks] == [False, False, False]
    set_modes(chain, None, full().select(chain))
    assert all(module.training for module in model.modules())


def test_a_dropout_shared_by_both_sides_of_the_cut_still_drops_behind_it() -> None:
    model, chain = make_net(shared=True)
    trainable = last(1).select(chain)
    set_modes(chain, chain.lowest_cut(trainable), trainable)
    assert model.blocks[0].dropout is model.blocks[2].dropout
    assert model.blocks[2].dropout.training
    assert not model.blocks[0].first.training


def test_set_modes_undoes_what_another_mode_or_phase_left() -> None:
    model, chain = make("timm ResNet")
    set_modes(chain, chain.features, head().select(chain))
    model.train()
    trainable = last(2).select(chain)
    set_modes(chain, chain.lowest_cut(trainable), trainable)
    once = [module.training for module in model.modules()]
    set_modes(chain, chain.features, head().select(chain))
    model.eval()
    set_modes(chain, chain.lowest_cut(trainable), trainable)
    assert [module.training for module in model.modules()] == once
    assert len(set(once)) == 2


# --- audit --------------------------------------------------------------------------------------------------------------


def train(chain: Chain, cut: Cut | None, trainable: frozenset[str], steps: int = 3) -> None:
    """Some steps of SGD behind the cut, as a phase takes them."""
    set_trainable(chain.model, trainable)
    pixels = make_pixels(chain.image_shape, 6)
    inputs = pixels if cut is None else chain.run_prefix([cut], pixels)[0]
    set_modes(chain, cut, trainable)
    optimizer = torch.optim.SGD([p for p in chain.model.parameters() if p.requires_grad], lr=0.05)

    def run(forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(forward(inputs), torch.arange(len(inputs)) % 5).backward()
            optimizer.step()

    if cut is None:
        run(lambda x: compute_logits(chain.model, x))
    else:
        with chain.part(cut) as suffix:
            run(suffix)


@pytest.mark.parametrize("name", ["timm ResNet", "timm MobileNetV3", "ResNet", "timm ViT", "SigLIP"])
def test_audit_passes_after_training_as_planned(name: str) -> None:
    model, chain = make(name)
    for policy in (head(), last(1), norms(), biases(), full()):
        trainable = policy.select(chain)
        cut = chain.lowest_cut(trainable)
        audit = Audit(chain, cut, trainable)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        train(chain, cut, trainable)
        audit.check()
        after = model.state_dict()
        moved = {n for n in trainable if not torch.equal(before[n], after[n])}
        # A bias of attention's keys cancels in the softmax.
        assert {n for n in trainable if not n.endswith("k_proj.bias")} <= moved


def test_audit_holds_what_does_not_train_and_every_buffer_before_the_cut() -> None:
    model, chain = make("timm ResNet")
    buffers = len(list(model.buffers()))
    parameters = len(list(model.parameters()))
    assert len(Audit(chain, chain.features, head().select(chain))) == buffers + parameters - 2
    assert len(Audit(chain, None, full().select(chain))) == 0
    assert len(Audit(chain, None, full().select(chain), freeze_batchnorm=True)) == buffers


@pytest.mark.parametrize("policy", [head(), last(1), last(3)])
def test_audit_catches_running_statistics_that_a_forward_in_train_mode_moves(policy: object) -> None:
    model, chain = make("timm ResNet")
    trainable = policy.select(chain)  # type: ignore[attr-defined]
    cut = chain.lowest_cut(trainable)
    set_trainable(model, trainable)
    audit = Audit(chain, cut, trainable)
    model.eval()
    model(make_pixels(chain.image_shape, 4))
    audit.check()
    model.train()  # the sabotage: what model.train() without set_modes does
    with torch.no_grad():
        model(make_pixels(chain.image_shape, 4))
    with pytest.raises(
        FrozenChangedError, match=r"frozen tensors changed: bn1\.num_batches_tracked, bn1\.running_mean"
    ):
        audit.check()


def test_audit_catches_a_frozen_norm_behind_the_cut_that_runs_in_train_mode() -> None:
    model, chain = make("timm ResNet")
    trainable = matching(r"layer4\.0\.conv1").select(chain)
    cut = chain.lowest_cut(trainable)
    audit = Audit(chain, cut, trainable)
    train(chain, cut, trainable)
    audit.check()
    model.layer4[0].bn2.train()
    assert cut is not None
    activation = chain.run_prefix([cut], make_pixels(chain.image_shape, 4))[0]
    with chain.part(cut) as suffix:
        suffix(activation)
    with pytest.raises(FrozenChangedError, match=r"^3 of \d+ .*: layer4\.0\.bn2\.num_batches_tracked, layer4"):
        audit.check()


@torch.no_grad()
def flip_last_bit(tensor: torch.Tensor) -> None:
    tensor.view(torch.int32).flatten()[-1] ^= 1


def test_audit_catches_one_bit_of_any_frozen_tensor_and_of_no_other() -> None:
    model, chain = make_net()
    trainable = last(1).select(chain)
    cut = chain.lowest_cut(trainable)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    frozen = {"stem_conv.weight", "stem_conv.bias"} | {n for n in tensors if n.startswith(("blocks.0.", "blocks.1."))}
    assert "blocks.0.gain" in frozen - model.state_dict().keys()
    for name, tensor in tensors.items():
        audit = Audit(chain, cut, trainable)
        if tensor.dtype == torch.float32:
            flip_last_bit(tensor)
        else:
            tensor.add_(1)
        if name in frozen:
            with pytest.raises(FrozenChangedError, match=f"^1 of {len(frozen)} frozen tensors changed: {name}. "):
                audit.check()
        else:
            audit.check()


def test_audit_catches_a_changed_orphan_and_a_sign_of_zero() -> None:
    model, chain = make("DINOv2")
    (orphan,) = chain.unused_parameters
    model.get_parameter(orphan).data.zero_()
    audit = Audit(chain, None, full().select(chain))
    model.get_parameter(orphan).data.neg_()
    with pytest.raises(FrozenChangedError, match=f"^1 of 1 frozen tensors changed: {orphan}"):
        audit.check()


def test_audit_names_five_and_counts_all() -> None:
    model, chain = make("timm ViT")
    audit = Audit(chain, chain.features, head().select(chain))
    model.half()
    with pytest.raises(FrozenChangedError) as caught:
        audit.check()
    count = len(audit)
    message = str(caught.value)
    assert message.startswith(f"{count} of {count} frozen tensors changed: blocks.0.attn.proj.bias, ")
    named, _, meaning = message.partition(", .... ")
    assert named.count(",") == 4
    assert "cached activations" in meaning


def test_audit_catches_a_tensor_that_is_gone() -> None:
    model, chain = make_net()
    audit = Audit(chain, chain.features, head().select(chain))
    del model.blocks[0].first
    with pytest.raises(FrozenChangedError, match=r"^1 of \d+ frozen tensors changed: blocks\.0\.first\.weight"):
        audit.check()


def test_audit_does_not_mind_another_memory_layout() -> None:
    model, chain = make("timm ResNet")
    audit = Audit(chain, chain.features, head().select(chain))
    model.to(memory_format=torch.channels_last)
    assert not model.layer4[0].conv1.weight.is_contiguous()
    audit.check()


# --- hashing ------------------------------------------------------------------------------------------------------------


def hash_of(name: str, tensor: torch.Tensor) -> str:
    digest = xxhash.xxh3_128()
    update_hash(digest, name, tensor)
    return digest.hexdigest()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3),
        torch.tensor(1.5),
        torch.empty(0, 3),
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.tensor(2.0, dtype=torch.float16),
        torch.tensor([True, False]),
        torch.arange(3),
        torch.randn(3, 2).T,
        torch.zeros(1).expand(4),
        nn.Parameter(torch.randn(2)),
    ],
    ids=lambda t: f"{t.dtype}{list(t.shape)}",
)
def test_a_hash_is_of_name_shape_type_and_bytes(tensor: torch.Tensor) -> None:
    own = hash_of("a", tensor)
    same = torch.tensor(tensor.tolist(), dtype=tensor.dtype).reshape(tensor.shape)
    assert hash_of("a", same) == own
    others = [("b", same), ("a", same[None]), ("a", same.view(torch.uint8) if same.ndim else same.long())]
    if same.numel():
        changed = same.clone()
        changed.view(-1)[-1] = ~changed.view(-1)[-1] if same.dtype == torch.bool else changed.view(-1)[-1] + 1
        others.append(("a", changed))
    assert len({own, *(hash_of(name, other) for name, other in others)}) == 1 + len(others)
