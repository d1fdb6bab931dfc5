"""The policies on a tiny transformer, against the formula of LoRA and PEFT's own switching."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners import lora

from diffusion_nft.models.lora import Lora
from diffusion_nft.models.precision import Precision
from diffusion_nft.models.sd3 import SD3Model
from diffusion_nft.policy import ADAPTERS, LoraLinear, Policy, policy_of_lora, unusual_modules
from tests.launch import LORA_TARGETS

RANK, ALPHA = 3, 12


def tiny_transformer() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=5,
        out_channels=4,
        pos_embed_max_size=4,
    ).requires_grad_(False)


@pytest.fixture
def base() -> SD3Transformer2DModel:
    return tiny_transformer()


@pytest.fixture
def transformer(base) -> SD3Transformer2DModel:
    return copy.deepcopy(base)


def make_policy(transformer, dtype=torch.float32, *, alpha: int = ALPHA, seed: int = 1) -> Policy:
    options = dict(targets=LORA_TARGETS, rank=RANK, alpha=alpha, seed=seed, dtype=dtype)
    return Policy(transformer, **options)


@pytest.fixture
def policy(transformer) -> Policy:
    """Adapters with different random weights."""
    policy = make_policy(transformer)
    for number, name in enumerate(ADAPTERS):
        g = torch.Generator().manual_seed(number)
        state = {k: torch.randn(v.shape, generator=g) for k, v in policy.state(name).items()}
        policy.load(name, state, others=False)
    return policy


def predict(transformer) -> torch.Tensor:
    g = torch.Generator().manual_seed(7)
    return transformer(
        hidden_states=torch.randn(2, 4, 4, 4, generator=g),
        timestep=torch.tensor([100.0, 700.5]),
        encoder_hidden_states=torch.randn(2, 3, 6, generator=g),
        pooled_projections=torch.randn(2, 5, generator=g),
        return_dict=False,
    )[0]


def merged(base, state: dict[str, torch.Tensor]) -> SD3Transformer2DModel:
    """``base`` with W + alpha / rank B A written into its weights: LoRA by its definition."""
    model = copy.deepcopy(base)
    for key, a in state.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            b = state[f"{name}.lora_B.weight"]
            model.get_submodule(name).weight.add_(ALPHA / RANK * b @ a)
    return model


def test_a_fresh_policy_is_the_base_and_equal_on_every_rank(base, transformer):
    policy = make_policy(transformer, seed=5)
    for name in (*ADAPTERS, "reference"):
        with policy.use_adapter(name):
            assert torch.equal(predict(transformer), predict(base))
    torch.manual_seed(99)
    other = make_policy(copy.deepcopy(base), seed=5)
    states = policy.state("current"), other.state("old")
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    a = torch.cat([v.flatten() for k, v in states[0].items() if "lora_A" in k])
    assert float(a.std()) == pytest.approx(1 / RANK, rel=0.1)
    assert len(states[0]) == 2 * 15 and all(".attn." in key for key in states[0])
    third = make_policy(copy.deepcopy(base), seed=6).state("current")
    assert not torch.equal(next(iter(third.values())), next(iter(states[0].values())))


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_adapter_is_the_base_plus_its_own_low_rank_product(base, transformer, policy, name):
    with policy.use_adapter(name):
        ours = predict(transformer)
    expected = predict(merged(base, policy.state(name)))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, predict(base), atol=1e-2)


@pytest.mark.parametrize("name", [*ADAPTERS, "reference"])
def test_using_restores_also_after_an_exception_and_when_nested(transformer, policy, name):
    before = predict(transformer)
    with pytest.raises(RuntimeError, match="boom"), policy.use_adapter(name):
        inside = predict(transformer)
        with policy.use_adapter("old"), policy.use_adapter("reference"):
            pass
        assert torch.equal(predict(transformer), inside)
        raise RuntimeError("boom")
    assert torch.equal(predict(transformer), before)
    with policy.use_adapter("current"):
        assert torch.equal(predict(transformer), before)


def test_only_the_current_policy_receives_gradients(transformer, policy):
    for name in ("old", "ema", "reference"):
        with policy.use_adapter(name):
            assert not predict(transformer).requires_grad
    predict(transformer).square().sum().backward()
    with_gradient = {n for n, p in transformer.named_parameters() if p.grad is not None}
    # The last block gives up its text stream, so its projections of the text have none.
    assert with_gradient and all(".current." in name for name in with_gradient)
    assert {n for n, p in transformer.named_parameters() if p.requires_grad} >= with_gradient
    assert sum(p.requires_grad for p in transformer.parameters()) == len(policy.parameters())


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.999, 1.0])
def test_blend_moves_one_adapter_towards_the_current_one(policy, decay):
    before = {n: {k: v.clone() for k, v in policy.state(n).items()} for n in ADAPTERS}
    policy.ema_update("old", decay)
    for key, value in policy.state("old").items():
        expected = decay * before["old"][key] + (1 - decay) * before["current"][key]
        torch.testing.assert_close(value, expected)
        if decay == 0:
            assert torch.equal(value, before["current"][key])
    for name in ("current", "ema"):
        assert all(torch.equal(v, before[name][k]) for k, v in policy.state(name).items())


def test_load_sets_all_or_one_and_refuses_what_does_not_fit(policy):
    state = {key: torch.full_like(value, 0.5) for key, value in policy.state("ema").items()}
    policy.load("ema", state, others=False)
    assert not torch.equal(policy.parameters("old")[0], policy.parameters("ema")[0])
    policy.load("current", state)
    for name in ADAPTERS:
        assert all((value == 0.5).all() for value in policy.state(name).values())
    key = next(iter(state))
    for wrong in (
        {k: v for k, v in state.items() if k != key},
        state | {"other.lora_A.weight": state[key]},
        state | {key: torch.zeros(1, 1)},
    ):
        with pytest.raises(ValueError, match="does not fit"):
            policy.load("current", wrong)


def layers(transformer) -> list[LoraLinear]:
    return [module for module in transformer.modules() if isinstance(module, LoraLinear)]


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-15)])
def test_merged_and_unmerged_agree_to_rounding_at_equal_weights(base, dtype, within):
    transformer = base.to(dtype)
    policy = make_policy(transformer, dtype)
    g = torch.Generator().manual_seed(3)
    # Changes of a few steps, by which the prediction moves a thousand times more than allowed.
    state = {k: 1e-3 * torch.randn(v.shape, generator=g) for k, v in policy.state("old").items()}
    state |= {k: 1e3 * v for k, v in state.items() if ".lora_A." in k}
    x = torch.randn(7, 5, 8, generator=g).to(dtype)
    before = [layer(x).detach() for layer in layers(transformer)]
    policy.load("current", state)
    for layer, untrained in zip(layers(transformer), before, strict=True):
        current = layer(x).detach()
        with policy.use_adapter("old"):
            assert layer.merged_weight is not None
            old = layer(x)
        assert float((old - current).norm() / current.norm()) < within
        assert float((untrained - current).norm() / current.norm()) > 1e3 * within


@torch.no_grad()
def test_merging_never_writes_to_the_base(base, transformer, policy):
    for name in ("old", "ema", "old"):
        with policy.use_adapter(name):
            predict(transformer)
    names = [name for name, _ in base.named_parameters()]
    for name in names:
        module, _, kind = name.rpartition(".")
        if not any(name.startswith(key.split(".lora_")[0]) for key in policy.state("old")):
            assert torch.equal(transformer.get_parameter(name), base.get_parameter(name))
            continue
        kept = transformer.get_parameter(f"{module}.base_layer.{kind}")
        assert torch.equal(kept, base.get_parameter(name))
    assert not any("merged" in key for key in transformer.state_dict())
    assert all(layer.merged_weight is None for layer in layers(transformer))


@torch.no_grad()
def test_a_merged_adapter_follows_whatever_changes_it(base, transformer, policy):
    def check() -> None:
        expected = predict(merged(base, policy.state("old")))
        torch.testing.assert_close(predict(transformer), expected, rtol=1e-4, atol=1e-4)

    with policy.use_adapter("old"):
        check()
        policy.ema_update("old", 0.5)
        check()
        policy.load("old", policy.state("ema"), others=False)
        check()
    for weight in policy.parameters("old"):
        weight.mul_(0.3)
    with policy.use_adapter("old"):
        check()


@torch.no_grad()
def test_an_adapter_is_merged_once_between_changes(transformer, policy, monkeypatch):
    made = []
    merge = LoraLinear.merge_weight
    monkeypatch.setattr(
        LoraLinear, "merge_weight", lambda self, name: made.append(name) or merge(self, name)
    )
    for name in ("old", "reference", "current", "old", "old"):
        with policy.use_adapter(name):
            predict(transformer)
    assert made == ["old"] * len(layers(transformer))
    policy.ema_update("old", 0.5)
    for _ in range(2):
        with policy.use_adapter("old"):
            predict(transformer)
    assert made == ["old"] * 2 * len(layers(transformer))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_merged_as_it_would_lose_small_changes(base, dtype):
    transformer = base.to(dtype)
    policy = Policy(transformer, targets=LORA_TARGETS, rank=2, alpha=2, seed=0, dtype=torch.float32)
    layer = layers(transformer)[0]
    layer.base_layer.weight.fill_(0.1)
    layer.base_layer.bias.fill_(0)
    signs = torch.tensor([1.0, -1.0]).repeat(layer.in_features // 2)  # orthogonal to equal weights
    state = {
        k: 3e-3 * (signs.expand(v.shape) if ".lora_A." in k else torch.ones(v.shape))
        for k, v in policy.state("old").items()
    }
    policy.load("current", state)
    x = signs.to(dtype).expand(1, 2, -1)
    with torch.autocast("cpu", dtype):
        now = layer(x)
        with policy.use_adapter("old"):
            assert layer.merged_weight is None
            assert torch.equal(layer(x), now)
        assert not layer.base_layer(x).any() and now.all()
    # Written into the weights, the same change would be gone.
    weight = layer.base_layer.weight
    assert torch.equal((weight.float() + 2 * 3e-3**2).to(dtype), weight)


@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_the_layer_and_its_gradients_are_pefts(base, dtype, within):
    trained = torch.promote_types(dtype, torch.float32)
    transformer = base.to(dtype)
    policy = make_policy(transformer, trained)
    g = torch.Generator().manual_seed(2)
    state = {k: torch.randn(v.shape, generator=g) for k, v in policy.state("current").items()}
    policy.load("current", state)
    layer = layers(transformer)[0]
    x = torch.randn(3, 5, layer.in_features, generator=g).to(dtype).requires_grad_()
    weights = [layer.lora_A["current"].weight, layer.lora_B["current"].weight]
    cotangent = torch.randn(3, 5, layer.out_features, generator=g).to(trained)

    def results(forward) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != trained):
            y = forward(x)
        return [y, *torch.autograd.grad((cotangent * y).sum(), [x, *weights])]

    theirs = results(lambda x: lora.Linear.forward(layer, x))
    for mine, other in zip(results(layer), theirs, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        assert float((mine - other).detach().norm() / other.detach().norm()) < within


# On kinds of linear layers that training leaves alone, and on few that it adapts.
OTHERS = [
    "ff.net.0.proj",
    "norm1.linear",
    "context_embedder",
    "proj_out",
    "timestep_embedder.linear_1",
]


@torch.no_grad()
@pytest.mark.parametrize("targets", [OTHERS, ["attn.to_q"], [*LORA_TARGETS, "ff.net.2"]])
def test_a_lora_on_any_linear_layers_is_the_policy_that_peft_has(base, transformer, targets):
    options = dict(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
    theirs = get_peft_model_state_dict(wrapped)
    state = {key.removeprefix("base_model.model."): value for key, value in theirs.items()}
    precision = Precision("no", torch.device("cpu"))
    model = SimpleNamespace(transformer=transformer, precision=precision)
    policy = policy_of_lora(model, Lora(state))
    expected = predict(wrapped)
    assert float((expected - predict(base)).norm() / expected.norm()) > 1e-2
    torch.testing.assert_close(predict(transformer), expected, rtol=1e-4, atol=1e-5)
    with policy.use_adapter("current"):
        torch.testing.assert_close(predict(transformer), expected, rtol=1e-4, atol=1e-5)
    with policy.use_adapter("reference"):
        assert torch.equal(predict(transformer), predict(base))


def test_unusual_modules_are_counted_and_named(transformer):
    model = SimpleNamespace(transformer=transformer, lora_targets=SD3Model.lora_targets)
    usual = [n for n, _ in transformer.named_modules() if n.endswith(LORA_TARGETS)]
    assert unusual_modules(model, usual, "attention") == ""
    assert unusual_modules(model, [*usual, "proj_out"], "attention") == "1 more (proj_out)"
    words = "1 more (proj_out), 14 fewer (transformer_blocks.0.attn.add_k_proj, ...)"
    assert (
        len(usual) == 15 and unusual_modules(model, ["proj_out", usual[-1]], "attention") == words
    )


def test_a_policy_names_the_layers_that_the_model_lacks(transformer):
    options = dict(rank=1, alpha=1, seed=0, dtype=torch.float32)
    for absent in ("attn.to_x", "pos_embed.proj", "to_q"[1:]):
        with pytest.raises(
            ValueError, match=f"does not fit this model, which has no linear layers {absent} "
        ):
            Policy(transformer, targets=["attn.to_q", absent], **options)


@pytest.mark.parametrize("alpha", [RANK, 2 * RANK, 12])
def test_a_policy_leaves_and_comes_back_as_it_was(base, transformer, alpha):
    policy = make_policy(transformer, alpha=alpha)
    g = torch.Generator().manual_seed(3)
    state = {k: torch.randn(v.shape, generator=g) for k, v in policy.state("ema").items()}
    policy.load("ema", state, others=False)
    lora = policy.lora("ema", "x")
    weight = f"{lora.modules[0]}.lora_{{}}.weight"
    a, b = (lora.state[weight.format(name)] for name in "AB")
    own = state[weight.format("B")] @ state[weight.format("A")] * alpha / RANK
    torch.testing.assert_close(b @ a, own)
    policy.load_lora(lora)
    for name in ADAPTERS:  # to the last bit, as alpha / rank is a power of two
        assert all(torch.equal(v, state[k]) for k, v in policy.state(name).items())
