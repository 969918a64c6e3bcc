"""Two and four processes end where one does, on the same global batches, by gloo on the CPU."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from softpref.algorithm.ranks import ALONE, Ranks
from softpref.models.sharding import can_shard
from tests.distributed import launch
from tests.distributed.scoring import CASES
from tests.distributed.work import results


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What every case comes to in one process."""
    return dict(results(tmp_path_factory.mktemp("one"), ALONE))


def by_rank(home, processes):
    """Run the cases in several processes; return what each comes to, rank by rank."""
    code, output = launch.together(processes, "tests.distributed.work", str(home), str(processes))
    assert code == 0, output[-3000:]

    class Cases(dict):
        def __missing__(self, name):
            assert not can_shard(), f"no case {name}"
            pytest.skip("needs transformers 5.19 and torch 2.13")

    names = {path.name.rsplit("-", 1)[0] for path in home.glob("*-0.safetensors")}
    return Cases({
        name: [load_file(home / f"{name}-{rank}.safetensors") for rank in range(processes)]
        for name in names
    })  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return by_rank(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return by_rank(tmp_path_factory.mktemp("four"), 4)


@pytest.fixture(params=["two", "four"])
def together(request):
    """What the cases come to on each of several processes."""
    return request.getfixturevalue(request.param)


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def assert_alike(by_rank, expected, largest):
    for of_rank in by_rank:
        for what, value in expected.items():
            assert error(of_rank[what], value) < largest, what
        assert torch.equal(of_rank["step"], expected["step"])


@pytest.mark.parametrize(
    ("name", "of_one"),
    [("step", "step"), ("few", "few"), ("sharded-step", "step"), ("full-step", "full-step"),
     ("full-step-graph", "full-step-graph")],
)  # fmt: skip
def test_a_step_in_float64_is_that_of_one_process(name, of_one, alone, together):
    for of_rank in together[name]:
        for what, expected in alone[of_one].items():
            assert error(of_rank[what], expected) < 1e-10, what


@pytest.mark.parametrize("base", ["", "sharded-"])
@pytest.mark.parametrize("engine", ["graph", "recompute"])
def test_a_step_of_another_engine_is_that_of_one_process_too(engine, base, alone, two):
    for of_rank in two[f"{base}step-{engine}"]:
        for what, expected in alone[f"step-{engine}"].items():
            assert error(of_rank[what], expected) < 1e-10, what


def test_a_step_by_the_equations_as_they_stand_is_that_of_one_process_too(alone, two):
    for of_rank in two["step-double_backward"]:
        for what, expected in alone["step"].items():
            assert error(of_rank[what], expected) < 1e-10, what


@pytest.mark.parametrize(
    ("name", "of_one", "largest"),
    [
        ("float64", "float64", 1e-6),
        ("float32", "float32", 1e-4),
        ("accumulated", "accumulated", 1e-6),
        ("sharded-float64", "float64", 1e-6),
        ("full-float64", "full-float64", 1e-6),
    ],
)
def test_twenty_steps_are_those_of_one_process(name, of_one, largest, alone, together):
    assert_alike(together[name], alone[of_one], largest)


@pytest.mark.parametrize("name", ["dpo", "evidence", "dr_dpo", "re_po"])
def test_other_steps_are_those_of_one_process_too(name, alone, two):
    assert_alike(two[name], alone[name], 1e-6)


@pytest.mark.parametrize(
    ("name", "largest"), [("float32", 1e-4), ("accumulated", 1e-6), ("dpo", 1e-6)]
)
def test_other_steps_with_a_sharded_base_are_too(name, largest, alone, two):
    assert_alike(two[f"sharded-{name}"], alone[name], largest)


@pytest.mark.parametrize(
    ("name", "largest"), [("float32", 1e-4), ("accumulated", 1e-6), ("dpo", 1e-6)]
)
def test_other_steps_with_all_weights_in_shards_are_too(name, largest, alone, two):
    assert_alike(two[f"full-{name}"], alone[f"full-{name}"], largest)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_share_what_a_command_scores_and_leave_the_files_of_one(name, alone, two):
    expected = alone[name]
    assert torch.equal(two[name][0]["files"], expected["files"])
    largest = max(int(of_rank["tokens"]) for of_rank in two[name])
    assert int(expected["tokens"]) >= 0.9 * 2 * largest


def test_shards_change_neither_a_models_hash_nor_what_its_graphs_are_said_to_take(two):
    for of_rank in two["shards"]:
        sharded, whole = of_rank["graphs"].tolist()
        assert sharded == pytest.approx(whole, rel=0.02)
        assert of_rank["hashes"][0].tolist() == of_rank["hashes"][1].tolist()


def test_processes_that_are_told_different_things_are_refused(two):
    assert all(of_rank["said"].tolist() == [1, 1] for of_rank in two["apart"])


def test_an_adapter_that_goes_pair_by_pair_is_refused_on_a_sharded_base(two):
    assert all(int(of_rank["said"]) == 1 for of_rank in two["refused"])


@pytest.mark.parametrize("name", ["step", "few", "float64", "float32", "sharded-float64"])
def test_all_ranks_hold_the_same_bits(name, together):
    first, *others = together[name]
    for other in others:
        assert all(torch.equal(other[what], first[what]) for what in first)


def test_in_as_many_processes_a_sharded_base_changes_no_bit(together):
    for sharded, whole in zip(together["sharded-float64"], together["float64"], strict=True):
        assert all(torch.equal(sharded[what], whole[what]) for what in whole)


def test_a_run_moves_its_policy_and_its_labels(alone):
    """The equalities above are not of runs that stand still."""
    losses = alone["float64"]["losses"]
    assert len(losses) == 20
    assert float(losses[-5:].mean()) < float(losses[:5].mean()) - 0.01
    assert error(alone["dpo"]["weights"], alone["as long as dpo"]["weights"]) > 1e-2
    assert error(alone["full-dpo"]["weights"], alone["full-float64"]["weights"]) > 1e-3


@pytest.mark.parametrize("name", ["poisoned", "sharded-poisoned", "full-poisoned"])
def test_a_step_that_is_not_finite_on_one_rank_is_taken_by_none(name, alone, two):
    expected = alone[name.removeprefix("sharded-")]
    assert int(expected["skipped"]) > 0
    for of_rank in two[name]:
        assert torch.equal(of_rank["skipped"], expected["skipped"])
        assert int(of_rank["named"]) == 1
        assert error(of_rank["weights"], expected["weights"]) < 1e-4


def test_ranks_that_drift_apart_are_found_by_all(together):
    assert all(int(of_rank["found"]) == 1 for of_rank in together["drift"])


@pytest.mark.parametrize(
    "name", ["counted", "sharded-counted", "full-counted-graph", "full-counted-recompute"]
)
def test_a_step_moves_the_bytes_that_the_calculator_foretells(name, together):
    for of_rank in together[name]:
        assert torch.equal(of_rank["counted"], of_rank["foretold"])


def test_shares_cover_everything_once_unless_they_are_fewer_than_the_ranks():
    for count in range(1, 12):
        shares = [Ranks(rank, 4).share(list(range(count))) for rank in range(4)]
        if count < 4:
            assert shares == [list(range(count))] * 4
        else:
            assert sorted(i for share in shares for i in share) == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
        even = [Ranks(rank, 4).share_evenly(list(range(count))) for rank in range(4)]
        assert {len(one) for one in even} == {max(map(len, shares))}
        assert all(one[: len(share)] == share for one, share in zip(even, shares, strict=True))
        assert all(set(one) == set(share) for one, share in zip(even, shares, strict=True))
