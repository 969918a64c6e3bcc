"""The benchmark: the contestants do the same work, and the numbers are what they say they are."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from softpref.bench import benchmark, memory
from softpref.bench.benchmark import OLDEST_TRL, ONE_BILLION, PRESETS, SHAPES, SMALL, BenchPreset
from softpref.bench.contestants import NAMES, ON_EVERY_SHAPE, make_contestant
from softpref.bench.report import Group, rows, runs
from softpref.bench.timing import Quartiles, paired_ratio, time_rounds
from softpref.bench.workload import TUNINGS, ModelSize, Shape, Workload
from softpref.cli import main
from softpref.errors import UsageError

TINY = ModelSize(64, 16, 24, 2, 4, 2, tie_word_embeddings=False)
pytestmark = pytest.mark.skipif(
    Version(version("trl")) < Version(OLDEST_TRL), reason=f"bench needs TRL {OLDEST_TRL}"
)
WORKLOAD = Workload(TINY, Shape(12, 6), "cpu", batches=2)
TWO_SHAPES = (WORKLOAD, dataclasses.replace(WORKLOAD, shape=Shape(4, 8)))
RATIOS = {
    "mspo_vs_trl_default", "mspo_vs_trl_best", "mspo_vs_dpo", "dpo_vs_trl_default",
    "double_backward_vs_dpo", "memory_mspo_vs_dpo",
    "graph_checkpointed_vs_dpo_checkpointed", "memory_graph_checkpointed_vs_dpo_checkpointed",
    "recompute_checkpointed_vs_dpo_checkpointed",
    "memory_recompute_checkpointed_vs_dpo_checkpointed",
}  # fmt: skip
DPOS = ("trl_default", "trl_best", "dpo")


def shaken(contestant):
    """Moves the policy away from its reference, where DPO's loss is log 2 whatever one does."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in contestant.model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=draw))
    return contestant


def gradients(contestant):
    return {
        name: p.grad.clone()
        for name, p in contestant.model.named_parameters()
        if p.requires_grad and p.grad is not None
    }


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_three_dpos_do_the_same_work(tuning, tmp_path):
    mine = shaken(make_contestant("dpo", WORKLOAD, tuning, tmp_path))
    for name in ("trl_default", "trl_best"):
        theirs = shaken(make_contestant(name, WORKLOAD, tuning, tmp_path))
        seen = set()
        for batch in (1, 2):
            losses = []
            for contestant in (mine, theirs):
                contestant.clear()
                losses.append(float(contestant.step(batch)))
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)
            assert abs(losses[0] - 0.6931) > 1e-3
            seen.add(round(losses[0], 4))
            expected, found = gradients(theirs), gradients(mine)
            assert expected.keys() == found.keys()
            for parameter, gradient in expected.items():
                difference = (found[parameter] - gradient).norm() / gradient.norm()
                assert float(difference) < 1e-4, parameter
        assert len(seen) == 2


def test_all_see_the_same_tokens_and_as_many_as_they_should(tmp_path):
    trainers = [make_contestant(name, WORKLOAD, "lora", tmp_path).trainer for name in NAMES]
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    tokens = [[[row[c] for c in columns] for row in t.train_dataset] for t in trainers]
    assert all(other == tokens[0] for other in tokens[1:])
    assert len(tokens[0]) == WORKLOAD.pairs * WORKLOAD.batches
    lengths = [[len(ids) for ids in pair] for pair in tokens[0]]
    assert {9, 15} <= {prompt for prompt, *_ in lengths} <= set(range(9, 16))
    responses = {length for _, *both in lengths for length in both}
    assert {3, 9} <= responses <= set(range(3, 10))
    for pair in tokens[0]:
        ids = [i for part in pair for i in part]
        assert ids.count(1) == 2
        assert pair[1][-1] == pair[2][-1] == 1
        assert not {0, 2} & set(ids)


def test_clean_pairs_are_others_than_the_training_pairs():
    assert not set(WORKLOAD.train_pairs()["prompt"]) & set(WORKLOAD.clean_pairs()["prompt"])


@pytest.mark.parametrize("tuning", TUNINGS)
def test_trl_is_at_its_defaults_and_at_its_best(tuning, tmp_path):
    # Policy and recomputation, and by LoRA the same model again as the reference.
    passes = {"trl_default": 3 if tuning == "lora" else 2, "trl_best": 1, "dpo": 1}
    for name in DPOS:
        contestant, count = make_contestant(name, WORKLOAD, tuning, tmp_path), Counter()
        # Within a layer: hooks of the layer itself are not called when it is recomputed.
        modules = contestant.model.named_modules()
        inner = next(module for path, module in modules if path.endswith("layers.0.mlp"))
        inner.register_forward_pre_hook(lambda *_, count=count: count.update(["passes"]))
        if (reference := getattr(contestant.trainer, "ref_model", None)) is not None:
            reference.register_forward_pre_hook(lambda *_, count=count: count.update(["other"]))
        contestant.step(0)
        assert count["passes"] == passes[name]
        assert count["other"] == (1 if (name, tuning) == ("trl_default", "full") else 0)


def test_the_response_only_head_is_on_in_its_step_and_nowhere_else(tmp_path, monkeypatch):
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    scored, kernel = [], utils._ChunkedLogProbFunction

    def apply(hidden, *rest):
        scored.append(len(hidden))
        return kernel.apply(hidden, *rest)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=apply))
    own = utils._use_triton
    best = make_contestant("trl_best", WORKLOAD, "lora", tmp_path)
    default = make_contestant("trl_default", WORKLOAD, "lora", tmp_path)
    scored.clear()
    best.step(0)
    pairs = best.trainer.train_dataset.select(range(WORKLOAD.pairs))
    responses = sum(len(row[c]) for row in pairs for c in ("chosen_ids", "rejected_ids"))
    assert scored == [responses]
    default.step(0)
    assert min(scored[1:]) > responses
    assert utils._use_triton is own is chunked_logprob._use_triton


def test_mspo_is_asked_for_its_clean_batch_and_engine(tmp_path):
    asked = {
        name: make_contestant(name, WORKLOAD, "lora", tmp_path).trainer.args
        for name in NAMES[3:]
        if name != "dpo_checkpointed"
    }
    found = {name: (args.meta_batch_size, args.engine) for name, args in asked.items()}
    assert found == {
        "mspo_m1/8": (1, "auto"),
        "mspo_m1": (8, "auto"),
        "double_backward": (1, "double_backward"),
        "graph_checkpointed": (1, "graph"),
        "recompute_checkpointed": (1, "recompute"),
    }
    checkpointed = {name for name, args in asked.items() if args.activation_checkpointing}
    assert checkpointed == {"graph_checkpointed", "recompute_checkpointed"}


class Racer:
    def __init__(self, name, log, fits=True):
        self.name, self.log, self.fits = name, log, fits

    def clear(self):
        self.log.append((self.name, "clear"))

    def step(self, batch):
        if not self.fits:
            raise torch.OutOfMemoryError
        self.log.append((self.name, batch))


def test_rounds_are_interleaved_and_their_order_turns():
    log, ticks = [], []
    racers = {name: Racer(name, log, fits=name != "d") for name in "abcd"}
    rounds = {"a": 3, "b": 3, "c": 1, "d": 3}
    seconds = time_rounds(racers, rounds, "cpu", lambda: ticks.append(1))
    steps = [entry for entry in log if entry[1] != "clear"]
    assert steps == [
        ("a", 0), ("b", 0), ("c", 0),  # untimed
        ("a", 0), ("b", 0), ("c", 0),
        ("b", 1), ("a", 1),
        ("a", 2), ("b", 2),
    ]  # fmt: skip
    for before, after in zip(log, log[1:], strict=False):
        if after[1] != "clear":
            assert before[1] == "clear"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 1, "d": 0}
    assert len(ticks) == 4 + 7


def test_double_backward_takes_part_in_fewer_rounds():
    rounds = {name: BenchPreset(TWO_SHAPES, 5, 2, {}).rounds_of(name) for name in NAMES}
    assert rounds.pop("double_backward") == 2
    assert set(rounds.values()) == {5}
    assert BenchPreset(TWO_SHAPES, 1, 2, {}).rounds_of("double_backward") == 1


def test_ratios_are_formed_within_a_round():
    assert paired_ratio([1.0, 6.0, 20.0], [2.0, 4.0, 5.0]) == Quartiles(1.5, 1.0, 2.75)
    assert paired_ratio([3.0], [2.0, 100.0]) == Quartiles(1.5, 1.5, 1.5)
    assert paired_ratio([], [2.0]) is None


def group(tuning, workload=WORKLOAD, **seconds):
    times = {"trl_default": 4.0, "trl_best": 2.0, "dpo": 1.0, "mspo_m1/8": 1.2, "mspo_m1": 2.5,
             "double_backward": 3.0, "dpo_checkpointed": 2.0,
             "graph_checkpointed": 5.0, "recompute_checkpointed": 6.0} | seconds  # fmt: skip
    return Group(
        tuning,
        workload,
        {name: [second, 2 * second] if second else [] for name, second in times.items()},
        {
            "dpo": [100.0, 200.0],
            "mspo_m1/8": [110.0, 260.0],
            "dpo_checkpointed": [50.0, 50.0],
            "graph_checkpointed": [60.0, 55.0],
        },
        response_only_head=True,
    )


def test_json_holds_the_ratios_it_names():
    few, whole = runs([group("lora"), group("full", double_backward=None)])
    assert (few["m"], whole["m"]) == (0.125, 1.0)
    assert few["shape"] == {"prompt": 12, "response": 6}
    assert few["dtype"] == "float32"
    medians = {name: ratio["median"] for name in RATIOS if (ratio := few["lora"][name])}
    assert medians == pytest.approx(
        {
            "mspo_vs_trl_default": 0.3, "mspo_vs_trl_best": 0.6, "mspo_vs_dpo": 1.2,
            "dpo_vs_trl_default": 0.25, "double_backward_vs_dpo": 3.0, "memory_mspo_vs_dpo": 1.2,
            "graph_checkpointed_vs_dpo_checkpointed": 2.5,
            "recompute_checkpointed_vs_dpo_checkpointed": 3.0,
            "memory_graph_checkpointed_vs_dpo_checkpointed": 1.15,
        }
    )  # fmt: skip
    assert few["lora"]["seconds"] == pytest.approx(
        {"trl_default": 6.0, "trl_best": 3.0, "dpo": 1.5, "mspo": 1.8, "double_backward": 4.5,
         "dpo_checkpointed": 3.0, "graph_checkpointed": 7.5,
         "recompute_checkpointed": 9.0}
    )  # fmt: skip
    assert few["lora"]["peak_mib"] == {
        "trl_default": None, "trl_best": None, "dpo": 150.0, "mspo": 185.0, "double_backward": None,
        "dpo_checkpointed": 50.0, "graph_checkpointed": 57.5,
        "recompute_checkpointed": None,
    }  # fmt: skip
    assert few["full"]["double_backward_vs_dpo"] is None
    assert whole["lora"]["mspo_vs_dpo"]["median"] == pytest.approx(2.5)
    assert whole["lora"]["memory_mspo_vs_dpo"] is None
    assert whole["lora"]["double_backward_vs_dpo"] is None


def test_every_row_of_the_table_says_what_it_is_about():
    header, *body = rows([group("lora"), group("full", double_backward=None)])
    assert len(body) == 2 * len(NAMES)
    line = dict(zip(header, body[3], strict=True))
    assert line == {
        "tuning": "LoRA r=16", "dtype": "float32", "prompt + response, tokens": "12 + 6",
        "m": "1/8", "step": "softpref MSPO", "seconds": "1.800",
        "x TRL's default": "0.30 (0.30 to 0.30)", "x TRL at its best": "0.60 (0.60 to 0.60)",
        "x our DPO": "1.20 (1.20 to 1.20)", "peak, MiB": "185",
    }  # fmt: skip
    assert "response-only head: on" in body[1][4]
    double_backward = body[len(NAMES) + NAMES.index("double_backward")]
    assert double_backward[5:] == ("-",) * 5


def test_the_command_measures_prints_and_writes(tmp_path, monkeypatch, capsys):
    tiny = BenchPreset(TWO_SHAPES, 5, 2, {"dpo": 1, "mspo_m1/8": 2})
    monkeypatch.setitem(PRESETS, "cpu", tiny)
    asked = []

    def stub(name, workload, tuning):
        asked.append((name, workload, tuning))
        return {"dpo": 100.0, "mspo_m1/8": 104.0}[name]

    monkeypatch.setattr(benchmark, "peak_in_new_process", stub)
    threads = torch.get_num_threads()
    numbers, picture = tmp_path / "benchmark.json", tmp_path / "benchmark.png"
    try:
        main(["bench", "--rounds", "1", "--json", str(numbers), "--plot", str(picture)])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr()
    assert printed.err.count("Warning") == 0
    assert len(printed.out.splitlines()) == 1 + 2 * (len(NAMES) + len(ON_EVERY_SHAPE)) + 1
    found = json.loads(numbers.read_text())
    assert found.keys() == {"preset", "device", "machine", "versions", "threads", "runs"}
    assert (found["preset"], found["device"], found["threads"]) == ("cpu", "cpu", 1)
    assert {"softpref", "torch", "transformers", "trl"} <= found["versions"].keys()
    measured = [(run["shape"], run["m"]) for run in found["runs"]]
    assert measured == [(vars(w.shape), m) for w in TWO_SHAPES for m in (0.125, 1.0)]
    for run in found["runs"]:
        for tuning in TUNINGS:
            it = run[tuning]
            assert it.keys() == RATIOS | {"seconds", "peak_mib", "trl_best_response_only_head"}
            for name in ("mspo_vs_trl_default", "mspo_vs_trl_best", "mspo_vs_dpo"):
                ours, theirs = (it["seconds"][part] for part in name.split("_vs_"))
                # One round: the median of ratios is the ratio of medians.
                assert it[name]["median"] == pytest.approx(ours / theirs)
                assert it[name]["q1"] <= it[name]["median"] <= it[name]["q3"]
            ratio = it["memory_mspo_vs_dpo"]
            first = run["shape"] == vars(WORKLOAD.shape)
            assert (ratio and ratio["median"]) == (1.04 if first and run["m"] < 1 else None)
    assert all(workload is WORKLOAD for _, workload, _ in asked)
    assert Counter(name for name, *_ in asked) == {"dpo": 2, "mspo_m1/8": 4}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_peak_is_what_the_steps_need_above_the_start(tmp_path, monkeypatch):
    before = torch.ones(100 * 2**18)  # 100 MiB, gone before the start: not counted

    class Hungry(Racer):
        def step(self, batch):
            assert torch.ones((40 + 10 * batch) * 2**18).sum() > 0

    def make(*_):
        nonlocal before
        before = None
        return Hungry("hungry", [])

    monkeypatch.setattr(memory, "make_contestant", make)
    peak = memory.peak("dpo", WORKLOAD, "lora", tmp_path)
    assert peak == pytest.approx(60, abs=2)


def test_peak_is_measured_in_a_process_of_its_own():
    workload = dataclasses.replace(WORKLOAD, shape=Shape(400, 40), pairs=2, batches=3)
    # At least one hidden state of 4 rows of 300 tokens; at most a fraction of the whole process.
    least = 4 * 300 * TINY.hidden_size * 4 / 2**20
    assert least < memory.peak_in_new_process("dpo", workload, "full") < 200


def test_a_failing_process_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)memory of dpo failed.*nonsense"):
        memory.peak_in_new_process("dpo", dataclasses.replace(WORKLOAD, device="nonsense"), "full")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "gpu"], "--preset gpu needs a CUDA device"),
        (["--preset", "tpu"], "tpu"),
        (["--rounds", "0"], "--rounds 0"),
        (["--json", "nowhere/benchmark.json"], "--json nowhere/benchmark.json"),
        (["--plot", "nowhere/benchmark.png"], "--plot nowhere/benchmark.png"),
    ],
)
def test_mistakes_have_one_message(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmark, "measure_preset", lambda preset: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_models_have_the_sizes_they_are_known_by():
    for size, parameters in ((SMALL, 6_450_432), (ONE_BILLION, 1_235_814_400)):
        model = Workload(size, SHAPES[0], "meta").model("full")
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_gpu_computes_in_bfloat16():
    assert all(workload.dtype == torch.bfloat16 for workload in PRESETS["gpu"].workloads)
    assert all(workload.dtype == torch.float32 for workload in PRESETS["cpu"].workloads)


def test_an_older_trl_is_refused_by_its_version(monkeypatch):
    monkeypatch.setattr(benchmark, "version", lambda name: "1.8.0")
    with pytest.raises(UsageError, match=r"bench needs TRL 1\.16 or newer, not 1\.8\.0"):
        benchmark.run_bench(benchmark.BenchOptions())
