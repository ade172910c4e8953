"""The decoder is the reference study's, and every derivative the operators need runs through it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from hessprobe.errors import UserError
from hessprobe.models.transformer import SIZES, Attention, Decoder, DecoderConfig, rotate, rotation_tables
from tests import oracles

torch.set_num_threads(1)

TINY = DecoderConfig(layers=2, width=8, feedforward=12, heads=2, vocabulary=11, context=6, attention="math")
VARIANTS = {
    "study": TINY,
    "sdpa": dataclasses.replace(TINY, attention="sdpa"),
    "swiglu": dataclasses.replace(TINY, mlp="swiglu"),
    "layernorm": dataclasses.replace(TINY, norm="layernorm"),
    "tied": dataclasses.replace(TINY, tied=True),
    "no_query_key_norm": dataclasses.replace(TINY, query_key_norm=False),
}
each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(config: DecoderConfig, sequences: int = 2) -> torch.Tensor:
    return torch.randint(config.vocabulary, (sequences, config.context), generator=generator(7))


def scalar_loss(config: DecoderConfig):
    """A float64 model's loss as a function of its parameters, those parameters, and a random direction."""
    model = Decoder(config, generator=generator()).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    g = generator(1)
    direction = {name: torch.randn(p.shape, generator=g, dtype=p.dtype) for name, p in parameters.items()}
    inputs = tokens(config)

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            logits = functional_call(model, values, (inputs[:, :-1],))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten())

    return loss, parameters, direction


def moved(parameters, direction, by):
    return {name: p + by * direction[name] for name, p in parameters.items()}


def finite_difference(function, parameters, direction, step: float = 5e-5):
    """Fourth-order central difference: its error, step^4, lets the step stay far above rounding."""
    f = {s: function(moved(parameters, direction, s * step)) for s in (-2, -1, 1, 2)}
    return tree_map(lambda a, b, c, d: (8 * (c - b) - (d - a)) / (12 * step), f[-2], f[-1], f[1], f[2])


def inner(a, b) -> torch.Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


@pytest.mark.parametrize(("size", "count"), [("45M", 45_363_712), ("150M", 134_142_720)])
def test_parameter_counts_are_the_studys(size: str, count: int) -> None:
    model = Decoder(SIZES[size], generator=None)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == count


def test_module_names() -> None:
    names = dict(Decoder(dataclasses.replace(TINY, mlp="swiglu"), generator=None).named_modules())
    for module in ("embedding", "final_norm", "head", "blocks.1.attention_norm", "blocks.1.mlp_norm"):
        assert module in names
    for leaf in ("q", "k", "v", "out", "q_norm", "k_norm"):
        assert f"blocks.1.attention.{leaf}" in names
    for leaf in ("up", "gate", "down"):
        assert f"blocks.1.mlp.{leaf}" in names


def test_initial_scales() -> None:
    model = Decoder(SIZES["nano"], generator=generator())
    assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.03)
    for name, p in model.named_parameters():
        if name.endswith((".q.weight", ".up.weight", ".down.weight", "head.weight")):
            assert p.std().item() * p.shape[1] ** 0.5 == pytest.approx(1.0, rel=0.05), name
        elif p.ndim == 1:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)), name
    tied = Decoder(dataclasses.replace(SIZES["nano"], tied=True), generator=generator())
    assert tied.embedding.weight.std().item() == pytest.approx(64**-0.5, rel=0.03)


def test_weights_come_from_the_generator_alone() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        one = Decoder(TINY, generator=generator())
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        two = Decoder(TINY, generator=generator())
    other = Decoder(TINY, generator=generator(1))
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
        assert a.ndim == 1 or not torch.equal(a, c), name


def test_weights_ignore_ambient_dtype_and_device() -> None:
    expected, cpu = Decoder(TINY, generator=generator()).head.weight, generator()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = Decoder(TINY, generator=cpu).head.weight
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


@each_variant
def test_logits_are_causal(config: DecoderConfig) -> None:
    model = Decoder(config, generator=generator()).double()  # rounding decides nothing
    inputs = tokens(config)
    changed = inputs.clone()
    changed[:, 3] = (changed[:, 3] + 1) % config.vocabulary
    with torch.no_grad():
        a, b = model(inputs), model(changed)
    assert a.shape == (2, config.context, config.vocabulary)
    torch.testing.assert_close(a[:, :3], b[:, :3], rtol=0, atol=1e-12)
    assert ((a - b)[:, 3:].abs().amax((0, 2)) > 1e-4).all()


def test_both_attention_paths_agree() -> None:
    config = dataclasses.replace(SIZES["nano"], layers=2)
    fused = Decoder(dataclasses.replace(config, attention="sdpa"), generator=generator())
    written = Decoder(dataclasses.replace(config, attention="math"), generator=generator())
    inputs = tokens(config)
    with torch.no_grad():
        single, other = fused(inputs), written(inputs)
        assert single.dtype == torch.float32 and oracles.relative_error(single, other) < 1e-4
        torch.testing.assert_close(fused.double()(inputs), written.double()(inputs), rtol=1e-12, atol=1e-12)
    for model in (fused, written):
        model(inputs).square().mean().backward()
    for (name, a), b in zip(fused.named_parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_rotation_depends_on_relative_position_only() -> None:
    q, k = torch.randn(2, 6, generator=generator(), dtype=torch.float64)
    table = rotation_tables(8, 6, like=q)
    scores = rotate(q.expand(8, 6), table) @ rotate(k.expand(8, 6), table).T
    for offset in range(-3, 4):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-12)
    assert (scores[0] - scores[0, 0]).abs()[1:].min() > 1e-6
    torch.testing.assert_close(rotate(q.expand(8, 6), table)[0], q)


def test_query_key_norm_spans_the_full_width_before_the_heads() -> None:
    attention = Decoder(TINY, generator=generator()).get_submodule("blocks.0.attention")
    assert isinstance(attention, Attention) and isinstance(attention.q_norm, torch.nn.LayerNorm)
    assert isinstance(attention.k_norm, torch.nn.LayerNorm)
    assert attention.q_norm.weight.shape == attention.k_norm.bias.shape == (TINY.width,)
    x = torch.randn(1, 4, 8, generator=generator())
    rotation = rotation_tables(4, 4, like=x)
    before = attention(x, rotation)
    attention.q.weight.data *= 3  # undone by the norm, up to its epsilon
    torch.testing.assert_close(attention(x, rotation), before, rtol=1e-4, atol=1e-5)


def test_tied_head_is_one_parameter() -> None:
    model = Decoder(VARIANTS["tied"], generator=generator())
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    zero = {"embedding.weight": torch.zeros_like(model.embedding.weight)}
    assert functional_call(model, zero, (tokens(TINY),)).abs().max() == 0
    assert Decoder(VARIANTS["tied"], generator=None).head.weight.is_meta


@each_variant
def test_forward_mode_equals_finite_differences(config: DecoderConfig) -> None:
    loss, parameters, direction = scalar_loss(config)
    slope = jvp(loss, (parameters,), (direction,))[1]
    torch.testing.assert_close(slope, finite_difference(loss, parameters, direction), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(slope, inner(grad(loss)(parameters), direction), rtol=1e-11, atol=1e-12)


@each_variant
def test_dual_numbers_keep_the_reverse_graph(config: DecoderConfig) -> None:
    loss, parameters, direction = scalar_loss(config)
    with torch.autograd.forward_ad.dual_level():
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        dual = {name: torch.autograd.forward_ad.make_dual(p, direction[name]) for name, p in leaves.items()}
        value, tangent = torch.autograd.forward_ad.unpack_dual(loss(dual))
        assert tangent is not None
        pulled = torch.autograd.grad(value, list(leaves.values()))
    slope = jvp(loss, (parameters,), (direction,))[1]
    torch.testing.assert_close(tangent.detach(), slope)
    for (name, expected), got in zip(grad(loss)(parameters).items(), pulled, strict=True):
        torch.testing.assert_close(got, expected, msg=name)


@each_variant
def test_second_derivatives_agree_three_ways(config: DecoderConfig) -> None:
    loss, parameters, direction = scalar_loss(config)
    forward_over_reverse = jvp(grad(loss), (parameters,), (direction,))[1]

    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    first = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    slope = inner(dict(zip(leaves, first, strict=True)), direction)
    double_backward = torch.autograd.grad(slope, list(leaves.values()))

    difference = finite_difference(grad(loss), parameters, direction)
    for (name, expected), got in zip(forward_over_reverse.items(), double_backward, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11, msg=name)
        torch.testing.assert_close(difference[name], expected, rtol=1e-6, atol=1e-7, msg=name)


@each_variant
def test_vmap_over_parameters_equals_a_loop(config: DecoderConfig) -> None:
    loss, parameters, direction = scalar_loss(config)
    stacked = {name: torch.stack([p, p + 0.1 * direction[name]]) for name, p in parameters.items()}
    expected = torch.stack([loss(parameters), loss(moved(parameters, direction, 0.1))])
    torch.testing.assert_close(vmap(loss)(stacked), expected, rtol=1e-12, atol=1e-12)
    two = {name: torch.stack([d, 2 * d]) for name, d in direction.items()}
    tangents = vmap(lambda v: jvp(loss, (parameters,), (v,))[1])(two)
    torch.testing.assert_close(tangents[1], 2 * tangents[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "width 8 into parts of equal, even size.*got heads 3.*Valid: 1, 2, 4"),
        ({"heads": 8}, "even size.*got heads 8. Valid: 1, 2, 4"),
        ({"layers": 0}, "layers must be a whole number of at least 1, got 0"),
        ({"context": 2.5}, "context must be"),
        ({"mlp": "relu"}, "no mlp named 'relu'.*Valid: gelu, swiglu"),
        ({"norm": "rms_norm"}, "Did you mean 'rmsnorm'"),
        ({"attention": "flash"}, "Valid: sdpa, math"),
    ],
)
def test_impossible_shapes_are_refused(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(TINY, **change)


def test_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="sequences of 7 tokens; this decoder's context is 6"):
        Decoder(TINY, generator=generator())(torch.zeros(1, 7, dtype=torch.long))
