"""One contract for all ways to make J, and the choice between them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, get_peft_model
from torch import nn

from softpref.algorithm.gradients.engine import (
    StepSize,
    choose_engine,
    find_untapped,
    graph_gib,
    kept_gib,
)
from softpref.algorithm.gradients.forms import Factors, FewRows, Outer, dense
from softpref.algorithm.gradients.jacobian import (
    DoubleBackwardJacobian,
    FactoredPullback,
    GraphJacobian,
    GraphPullback,
    RecomputedJacobian,
    kept,
)
from softpref.algorithm.gradients.taps import NotTappedError, Taps
from softpref.algorithm.likelihood import measure
from softpref.algorithm.policy import nudge, shifted, trainable
from softpref.data.batches import make_batch, make_shared_batch
from softpref.models.loading import switch_dropout_off
from tests.tiny import (
    ARCHITECTURES,
    VOCABULARY,
    random_pairs,
    tiny_model,
    with_lora,
    without_float32,
)


def pair_by_pair(policy, batch, ppl_scope):
    return kept(policy, batch, ppl_scope, untapped=frozenset(trainable(policy)))


MAKERS = {
    "kept": kept,
    "graph": GraphJacobian,
    "recompute": RecomputedJacobian,
    "double_backward": DoubleBackwardJacobian,
    "pair by pair": pair_by_pair,
}
LAYOUTS = {
    "padded": make_batch,
    "padded, response head": partial(make_batch, head_positions="scored"),
    "shared": make_shared_batch,
    "shared, response head": partial(make_shared_batch, head_positions="scored"),
    "shared, rows": partial(make_shared_batch, head_positions="scored", hidden_size=1),
}


def flat(gradient):
    return torch.cat([g.flatten() for g in gradient])


def error(a, b):
    """Norm-wise: transformers computes norms, rotations and softmax in float32 (about 1e-7)."""
    return float((a - b).norm() / b.norm())


def slow_matrix(policy, pairs):
    """J row by row: each pair alone, padded, from all logits, one ordinary backward each."""
    rows = []
    for pair in pairs:
        margin = measure(policy, make_batch([pair]), "response").margin
        rows.append(flat(torch.autograd.grad(margin, trainable(policy), materialize_grads=True)))
    return torch.stack(rows)


def hold_to_contract(make, policy, batch, matrix, tolerance=1e-6):
    pairs = len(matrix)
    jacobian = make(policy, batch, "response")
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(pairs, generator=generator).to(matrix)
    direction = tuple(torch.randn(p.shape, generator=generator).to(p) for p in trainable(policy))
    for _ in range(2):  # a step asks for Jᵀw twice, with J d between
        assert error(flat(jacobian.vjp(weights)), weights @ matrix) < tolerance
        assert error(jacobian.jvp(direction), matrix @ flat(direction).to(matrix)) < tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("engine", MAKERS)
def test_every_jacobian_is_the_jacobian(engine, layout, tuning):
    policy = with_lora(tiny_model()) if tuning == "lora" else tiny_model()
    pairs = random_pairs(5)
    hold_to_contract(MAKERS[engine], policy, LAYOUTS[layout](pairs), slow_matrix(policy, pairs))


def test_the_graph_is_good_for_one_product():
    policy, pairs = with_lora(tiny_model()), random_pairs(3)
    jacobian = GraphPullback(policy, make_batch(pairs), "response")
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert error(flat(jacobian.vjp(weights)), weights @ slow_matrix(policy, pairs)) < 1e-6
    with pytest.raises(RuntimeError, match="second time"):
        jacobian.vjp(weights)


LORA_LAYOUTS = {
    "rank and alpha patterns": dict(
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}, alpha_pattern={"v_proj": 3}
    ),
    "rank-stabilised": dict(use_rslora=True),
    "some layers": dict(layers_to_transform=[1], target_modules=["v_proj", "up_proj"]),
    "some modules": dict(target_modules=["q_proj", "down_proj"]),
    "biases of the adapters": dict(lora_bias=True),
    "the head too": dict(target_modules=["q_proj", "lm_head"]),
    "initialised from the weights": dict(init_lora_weights="pissa"),
    "copied layers": dict(layer_replication=[[0, 2], [1, 2]]),
}


@pytest.mark.parametrize("kwargs", LORA_LAYOUTS.values(), ids=LORA_LAYOUTS)
def test_every_lora_layout_on_linear_layers(kwargs):
    policy = with_lora(tiny_model(dtype=torch.float32, attention="sdpa"), **kwargs).double()
    pairs = random_pairs(4)
    # An adapted head needs all logits: `refuse_response_head` says so.
    head = "all" if "lm_head" in kwargs.get("target_modules", ()) else "scored"
    batch = make_shared_batch(pairs, head)
    assert not find_untapped(policy, batch)
    hold_to_contract(kept, policy, batch, slow_matrix(policy, pairs))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("engine", ["kept", "graph", "recompute", "pair by pair"])
def test_gradient_checkpointing_changes_nothing(engine, architecture):
    policy, pairs = with_lora(tiny_model(architecture, attention="sdpa")), random_pairs(4)
    matrix = slow_matrix(policy, pairs)
    switch_dropout_off(policy)
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    hold_to_contract(MAKERS[engine], policy, LAYOUTS["shared, response head"](pairs), matrix)


def test_taps_keep_no_activations_that_checkpointing_gives_up():
    """Saved tensors go through autograd's own hooks, so a checkpoint sees and drops them."""
    policy, batch = with_lora(tiny_model(attention="sdpa")), make_shared_batch(random_pairs(2))
    saved = {}
    for checkpointed in (False, True):
        if checkpointed:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
        sizes = []

        def note(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            Taps(policy, batch).measure("response")
        saved[checkpointed] = sum(sizes)
    assert saved[True] < saved[False] / 3


def test_policy_is_untouched_afterwards():
    policy, batch = with_lora(tiny_model()), make_batch(random_pairs(3))
    before = {n: p.clone() for n, p in policy.state_dict().items()}
    find_untapped(policy, batch)
    for make in MAKERS.values():
        jacobian = make(policy, batch, "response")
        jacobian.jvp(jacobian.vjp(torch.ones(3)))
    after = policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in policy.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in policy.modules())


def dora(model):
    return with_lora(model, use_dora=True)


def trained_embeddings(model):
    return with_lora(model, modules_to_save=["embed_tokens"])


def loha(model):
    return get_peft_model(model, LoHaConfig(r=2, target_modules=["q_proj"]))


class UsesItsWeightBehindItsBack(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs) + 0.1 * inputs @ self.weight.T.tanh()


class Routed(nn.Linear):
    """Sees other rows than tokens, as an expert does."""

    def forward(self, inputs):
        return self.inner(inputs[:, ::2]).repeat_interleave(2, 1)[:, : inputs.shape[1]]


def sneaky(model):
    policy = with_lora(model)
    adapter = policy.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"]
    adapter.__class__ = UsesItsWeightBehindItsBack
    return policy


def routed(model):
    policy = with_lora(model)
    adapters = policy.get_base_model().model.layers[0].self_attn.q_proj.lora_A
    outer = Routed(16, 4, bias=False, dtype=torch.float64).requires_grad_(False)
    outer.inner = adapters["default"]
    adapters["default"] = outer
    return policy


@pytest.mark.parametrize(
    ("adapt", "unseen"),
    [
        (dora, "magnitude_vector"),
        (loha, "hada_"),
        (sneaky, "layers.0.self_attn.q_proj.lora_A"),
        (routed, "layers.0.self_attn.q_proj.lora_A"),
    ],
)
@pytest.mark.parametrize("engine", ["kept", "graph", "recompute"])
def test_what_taps_cannot_see_goes_pair_by_pair_in_words(adapt, unseen, engine):
    policy, pairs = adapt(tiny_model()), random_pairs(3)
    batch = make_batch(pairs)
    chosen = choose_engine(engine, policy, batch, StepSize.of([batch]))
    assert "go pair by pair" in chosen.why
    assert unseen in chosen.why
    hold_to_contract(chosen.make_jacobian, policy, batch, slow_matrix(policy, pairs))


def test_the_trial_looks_away_from_the_start_where_half_of_the_gradient_is_zero():
    """At B = 0 a wrong gradient of A is right: 0."""
    policy = sneaky(tiny_model())
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.zero_()
    assert len(find_untapped(policy, make_batch(random_pairs(3)))) == 1


@pytest.mark.parametrize("adapt", [routed, dora])
def test_a_layer_that_sees_no_tokens_is_refused(adapt):
    policy = adapt(tiny_model())
    with pytest.raises(NotTappedError):
        kept(policy, make_batch(random_pairs(3)), "response")


def test_choice_of_engine_follows_memory():
    policy, batch = tiny_model(), make_batch(random_pairs(2))

    def choice(step, budget=4.0):
        return choose_engine("auto", policy, batch, step, budget).why

    assert choice(StepSize(8, 200, 1)).startswith("kept, one pass")
    assert choice(StepSize(8, 200, 1), 0).startswith("graph, since the gradients of 8 pairs")
    assert choice(StepSize(8, 200, 4), 0).startswith("recompute, since")
    assert choice(StepSize(10**7, 2 * 10**8, 1)).startswith("graph")
    for engine in ("kept", "graph", "recompute", "double_backward"):
        why = choose_engine(engine, policy, batch, StepSize(8, 200, 1)).why
        assert why.startswith(f"{engine}, as asked for")


@pytest.mark.parametrize(("engine", "expected"), [("kept", 1), ("graph", 1), ("recompute", 3)])
def test_forward_passes_of_a_step(engine, expected, monkeypatch):
    policy, batch = with_lora(tiny_model()), make_batch(random_pairs(3))
    passes = []
    monkeypatch.setattr(
        policy, "forward", lambda *a, f=policy.forward, **k: (passes.append(1), f(*a, **k))[1]
    )
    jacobian = MAKERS[engine](policy, batch, "response")
    weights = torch.ones_like(jacobian.measure().margin)
    direction = jacobian.vjp(weights)
    jacobian.jvp(direction)
    jacobian.vjp(weights)
    assert len(passes) == expected


@settings(max_examples=15)
@given(
    pairs=st.integers(1, 5),
    longest=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    layout=st.sampled_from(sorted(LAYOUTS)),
    rank=st.integers(1, 5),
)
def test_taps_on_any_shape(pairs, longest, seed, layout, rank):
    policy = with_lora(without_float32(tiny_model(attention="sdpa")), r=rank)
    rows = random_pairs(pairs, seed, longest)
    with shifted(policy, nudge(policy, seed), 1.0):
        matrix = slow_matrix(policy, rows)
        hold_to_contract(kept, policy, LAYOUTS[layout](rows), matrix, tolerance=1e-9)


WIDE = dict(hidden_size=64, intermediate_size=96)  # matrices of more numbers than few tokens leave


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_taps_see_all_of_every_architecture(architecture, tied):
    policy = tiny_model(architecture, tie_word_embeddings=tied)
    pairs = random_pairs(4)
    for layout in ("shared", "shared, response head"):
        batch = LAYOUTS[layout](pairs)
        assert not find_untapped(policy, batch)
        for make in (kept, GraphJacobian):
            hold_to_contract(make, policy, batch, slow_matrix(policy, pairs))


def test_a_padding_token_among_the_tokens_has_no_gradient():
    """Many tokenizers pad with the end of sequence, which every response ends on."""
    policy, pairs = tiny_model(), random_pairs(3)
    assert policy.get_input_embeddings().padding_idx == 0
    pairs = [pair | {"chosen_ids": [*pair["chosen_ids"], 0, 5]} for pair in pairs]
    for make in (kept, GraphJacobian):
        hold_to_contract(make, policy, make_shared_batch(pairs), slow_matrix(policy, pairs))


@pytest.mark.parametrize("engine", MAKERS)
def test_a_tensor_that_is_not_used_has_no_gradient(engine):
    policy, pairs = tiny_model(), random_pairs(2)
    policy.unused = nn.Linear(3, 3, dtype=torch.float64)
    hold_to_contract(MAKERS[engine], policy, make_batch(pairs), slow_matrix(policy, pairs))


def test_positions_that_padded_rows_share_go_pair_by_pair():
    policy, batch = tiny_model("gpt2"), make_batch(random_pairs(4))
    position_embedding = policy.transformer.wpe.weight
    assert find_untapped(policy, batch) == {position_embedding}


@pytest.mark.parametrize(
    ("architecture", "config", "unseen"),
    [
        ("gemma3_text", dict(num_key_value_heads=2, head_dim=8), ""),
        ("stablelm", dict(num_key_value_heads=2, qk_layernorm=True), ""),
        ("falcon", dict(), ""),
        (
            "mixtral",
            dict(num_key_value_heads=2, num_local_experts=3, experts_implementation="eager"),
            "mlp",
        ),
    ],
)
def test_layers_of_other_kinds(architecture, config, unseen):
    """Scaled embeddings, norms of heads before tokens, sums in place; experts go pair by pair."""
    policy = tiny_model(architecture, intermediate_size=24, **config)
    pairs = random_pairs(4)
    batch = make_shared_batch(pairs)
    untapped = find_untapped(policy, batch)
    names = {name for name, p in policy.named_parameters() if p in untapped}
    assert names == {name for name, _ in policy.named_parameters() if unseen and unseen in name}
    for make in (kept, GraphJacobian):
        jacobian = partial(make, untapped=untapped)
        hold_to_contract(jacobian, policy, batch, slow_matrix(policy, pairs))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("head", ["all", "scored"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_gradient_in_factors_is_the_gradient(architecture, head, checkpointed):
    policy, pairs = tiny_model(architecture, **WIDE), random_pairs(3, longest=3)
    matrix = slow_matrix(policy, pairs)
    if checkpointed:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        switch_dropout_off(policy)
        policy.train()
    batch, weights = make_shared_batch(pairs, head), matrix.new_tensor([1.0, -2.0, 0.5])
    found = FactoredPullback(policy, batch, "response").vjp(weights)
    kinds = {
        name: type(held) for (name, _), held in zip(policy.named_parameters(), found, strict=True)
    }
    assert set(kinds.values()) == {torch.Tensor, Factors, FewRows}
    assert error(flat(map(dense, found)), weights @ matrix) < 1e-6
    # and what is multiplied by it is multiplied by the gradient
    for make in (kept, GraphJacobian):
        jacobian = make(policy, batch, "response")
        assert error(jacobian.jvp(found), matrix @ (weights @ matrix)) < 1e-6


def test_factors_only_where_these_are_fewer_numbers_and_are_seen_rightly():
    policy, pairs = tiny_model(**WIDE), random_pairs(3, longest=3)
    policy.model.layers[0].mlp.up_proj.__class__ = UsesItsWeightBehindItsBack
    matrix = slow_matrix(policy, pairs)
    batch, weights = make_shared_batch(pairs), matrix.new_tensor([1.0, -2.0, 0.5])
    untapped = find_untapped(policy, batch)
    assert untapped == {policy.model.layers[0].mlp.up_proj.weight}
    found = FactoredPullback(policy, batch, "response", untapped).vjp(weights)
    assert error(flat(map(dense, found)), weights @ matrix) < 1e-6
    tokens = batch.input_ids.numel()
    for p, held in zip(policy.parameters(), found, strict=True):
        if isinstance(held, Factors):
            assert tokens * sum(p.shape) < p.numel()
    longer = make_shared_batch(random_pairs(8))
    whole = FactoredPullback(policy, longer, "response").vjp(torch.ones(8, dtype=torch.float64))
    assert not any(isinstance(held, Factors) for held in whole)


@pytest.mark.parametrize("make", [kept, GraphJacobian])
def test_a_layer_that_runs_twice(make):
    """A parameter is then handed over twice, also where its gradient is left in factors."""
    policy, pairs = tiny_model(**WIDE), random_pairs(3, longest=3)
    policy.model.layers[1] = policy.model.layers[0]
    matrix = slow_matrix(policy, pairs)
    batch, weights = make_shared_batch(pairs), matrix.new_tensor([1.0, -2.0, 0.5])
    assert not find_untapped(policy, batch)
    hold_to_contract(make, policy, batch, matrix)
    found = FactoredPullback(policy, batch, "response").vjp(weights)
    assert any(isinstance(held, Factors) for held in found)
    assert error(flat(map(dense, found)), weights @ matrix) < 1e-6


@pytest.mark.parametrize("engine", ["kept", "graph", "recompute", "pair by pair"])
def test_a_head_of_which_the_bias_alone_trains(engine):
    policy, pairs = tiny_model("phi"), random_pairs(3)
    for name, p in policy.named_parameters():
        p.requires_grad_(name == "lm_head.bias" or "layernorm" in name)
    batch = make_shared_batch(pairs, "scored")
    assert not find_untapped(policy, batch)
    matrix = slow_matrix(policy, pairs)
    assert matrix[:, -VOCABULARY:].norm() > 0.1 * matrix.norm()
    hold_to_contract(MAKERS[engine], policy, batch, matrix)


def test_a_nan_in_the_trial_is_nothing_found_right():
    policy, batch = tiny_model(), make_shared_batch(random_pairs(3))
    with torch.no_grad():
        policy.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    assert find_untapped(policy, batch) == set(policy.parameters())


def test_the_graphs_are_measured_as_autograd_keeps_them():
    """Far less under checkpointing, in proportion to a step's tokens, without the weights."""
    policy = tiny_model(attention="sdpa")
    batch = make_shared_batch(random_pairs(4, longest=12))
    policy.train()
    size = StepSize.of([batch])
    found = graph_gib(policy, batch, size)
    double = StepSize(2 * size.pairs, 2 * size.tokens, 1)
    assert graph_gib(policy, batch, double) == pytest.approx(2 * found)
    hidden_state = batch.input_ids.numel() * 16 * 8 / 2**30
    assert 20 * hidden_state < found < 200 * hidden_state
    wide = tiny_model(attention="sdpa", hidden_size=128, intermediate_size=256)
    weights = sum(p.numel() for p in wide.parameters()) * 8 / 2**30
    few = make_shared_batch(random_pairs(1, longest=1))
    assert graph_gib(wide, few, StepSize.of([few])) < weights / 4
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    assert graph_gib(policy, batch, size) < found / 3


def test_large_matrices_are_held_by_their_tokens():
    """`kept` holds fewer numbers than B gradients, and the estimate says how many."""
    policy, pairs = tiny_model(hidden_size=64, intermediate_size=96), random_pairs(3, longest=3)
    for head in ("all", "scored"):
        batch = make_shared_batch(pairs, head)
        jacobian = kept(policy, batch, "response")
        forms = [form for _, form in jacobian._forms]
        assert any(isinstance(form, Outer) for form in forms)
        tensors = [
            value for form in forms for value in vars(form).values()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        ]  # fmt: skip
        assert not any(tensor.requires_grad for tensor in tensors)  # which would hold the graph
        numbers = sum(tensor.numel() for tensor in tensors)
        estimate = kept_gib(policy, batch, StepSize.of([batch])) * 2**30 / 4
        assert numbers == pytest.approx(estimate, rel=0.1)
        assert numbers < len(pairs) * sum(p.numel() for p in policy.parameters()) / 2
