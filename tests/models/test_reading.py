"""What a pass reads of each pair: against one pair and one token at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from softpref.algorithm.likelihood import measure
from softpref.data.batches import make_batch, make_shared_batch
from softpref.errors import UsageError
from softpref.models.reading import LARGEST_STATE, half_depth, middle_layer, project, read_pairs
from tests.tiny import ARCHITECTURES, random_pairs, tiny_model, with_lora, without_float32

LAYOUTS = {"padded": make_batch, "shared": make_shared_batch}


def slow(policy, pair, part: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A response's mean state after so many layers, and its tokens' log-probabilities."""
    states, logps = [], []
    ids = list(pair["prompt_ids"])
    for token in pair[part]:
        logits = policy(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        logps.append(F.log_softmax(logits, -1)[token])
        ids.append(token)
        out = policy(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        states.append(out.hidden_states[layer][0, -1])
    return torch.stack(states).mean(0), torch.stack(logps)


def slow_signals(policy, pair, layer: int) -> dict[str, torch.Tensor]:
    (chosen, of_chosen), (rejected, of_rejected) = (
        slow(policy, pair, part, layer) for part in ("chosen_ids", "rejected_ids")
    )
    words = [set(pair[part]) for part in ("chosen_ids", "rejected_ids")]
    return {
        "state": chosen - rejected,
        "likeness": chosen @ rejected / chosen.norm() / rejected.norm(),
        "distance": (chosen - rejected).square().sum().sqrt(),
        "chosen_spread": of_chosen.std(correction=0),
        "rejected_spread": of_rejected.std(correction=0),
        "overlap": torch.tensor(len(words[0] & words[1]) / len(words[0] | words[1])),
    }


def signals_of(policy, batch) -> dict[str, torch.Tensor]:
    with torch.no_grad(), half_depth(policy) as states:
        return read_pairs(policy, batch, "response", states)[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_signals_are_those_of_one_token_at_a_time(architecture, layout):
    policy, pairs = tiny_model(architecture, num_hidden_layers=4), random_pairs(5)
    found = signals_of(policy, LAYOUTS[layout](pairs))
    with torch.no_grad():
        for i, pair in enumerate(pairs):
            for name, expected in slow_signals(policy, pair, layer=2).items():
                low = {"rtol": 2e-3, "atol": 1e-4} if name == "state" else {}  # float16
                torch.testing.assert_close(
                    found[name][i].double(),
                    expected.double(),
                    **low or {"rtol": 1e-5, "atol": 1e-6},
                )


def test_an_adapters_states_are_the_adapted_ones():
    policy, pairs = with_lora(tiny_model(num_hidden_layers=4)), random_pairs(3)
    found = signals_of(policy, make_batch(pairs))
    with torch.no_grad():
        for i, pair in enumerate(pairs):
            expected = slow_signals(policy, pair, layer=2)["distance"]
            assert float(found["distance"][i]) == pytest.approx(float(expected), rel=1e-5)
        with policy.disable_adapter():
            bare = slow_signals(policy, pairs[0], layer=2)["distance"]
    assert float(bare) != pytest.approx(float(found["distance"][0]), rel=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_swap_turns_the_state_and_exchanges_the_spreads(layout):
    policy, pairs = without_float32(tiny_model()), random_pairs(6)
    swap = {"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"}
    turned = [pair | {new: pair[old] for new, old in swap.items()} for pair in pairs]
    before, after = (signals_of(policy, LAYOUTS[layout](some)) for some in (pairs, turned))
    torch.testing.assert_close(after["state"], -before["state"], rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(after["chosen_spread"], before["rejected_spread"])
    torch.testing.assert_close(after["rejected_spread"], before["chosen_spread"])
    for name in ("likeness", "distance"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(after["overlap"], before["overlap"])
    assert before["state"].abs().min() > 0


@pytest.mark.parametrize("scope", ["response", "sequence"])
def test_measurements_are_those_of_measure(scope):
    policy, batch = tiny_model(), make_batch(random_pairs(4))
    with torch.no_grad():
        expected = vars(measure(policy, batch, scope))
        with half_depth(policy) as states:
            found, _ = read_pairs(policy, batch, scope, states)
    for name, value in vars(found).items():
        torch.testing.assert_close(value, expected[name], equal_nan=True)


def test_a_one_token_response_has_no_spread():
    pair = random_pairs(1)[0] | {"chosen_ids": [5], "rejected_ids": [5]}
    found = signals_of(tiny_model(), make_batch([pair]))
    assert float(found["chosen_spread"]) == 0
    assert float(found["overlap"]) == 1
    assert (found["state"] == 0).all()
    assert float(found["likeness"]) == pytest.approx(1)


def test_states_are_read_only_where_asked_for():
    policy, batch = tiny_model(), make_batch(random_pairs(2))
    with half_depth(policy) as states:
        policy(batch.input_ids)
        assert states.pop().shape == (*batch.input_ids.shape, 16)
    policy(batch.input_ids)
    assert not states


@pytest.mark.parametrize(("depth", "layer"), [(1, 0), (2, 0), (4, 1), (5, 1)])
def test_the_middle_layer(depth, layer):
    policy = tiny_model(num_hidden_layers=depth)
    assert middle_layer(policy) is policy.model.layers[layer]


def test_a_model_that_counts_its_layers_otherwise_has_a_middle_too():
    policy = tiny_model(num_hidden_layers=4)
    policy.config = SimpleNamespace(get_text_config=SimpleNamespace)
    assert middle_layer(policy) is policy.model.layers[1]


def test_a_model_without_a_list_of_its_layers_is_refused():
    policy = tiny_model()
    policy.model.layers = torch.nn.Sequential(*policy.model.layers)
    with pytest.raises(UsageError, match="does not keep its layers in a list"):
        middle_layer(policy)


def test_long_states_are_projected_alike_and_keep_their_lengths():
    states = torch.randn(50, 600, generator=torch.Generator().manual_seed(1))
    found = project(states)
    assert found.shape == (50, LARGEST_STATE)
    torch.testing.assert_close(project(states[7:9]), found[7:9])
    ratio = found.norm(dim=1) / states.norm(dim=1)
    assert float(ratio.mean()) == pytest.approx(1, abs=0.05)
    assert project(states[:, :LARGEST_STATE]).equal(states[:, :LARGEST_STATE])
