"""What several processes do, the same in one: run by torchrun, or called.

Each case returns named tensors; rank r of n writes them to `<case>-<r>.safetensors`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from benchmarks import scaling
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed.configuration_utils import DistributedConfig

from softpref.algorithm import MetaLearner
from softpref.algorithm.bilevel import mspo_step
from softpref.algorithm.gradients.engine import StepSize, choose_engine, graph_gib
from softpref.algorithm.gradients.forms import dense
from softpref.algorithm.gradients.shards import reduce_gradients, reshard_after_error, whole
from softpref.algorithm.objective import GEOMETRIC, Objective
from softpref.algorithm.policy import trainable
from softpref.algorithm.ranks import DriftError, Ranks
from softpref.data.batches import length_buckets, make_batch
from softpref.errors import UsageError
from softpref.models.reference import fingerprint_weights
from softpref.models.sharding import can_shard
from softpref.statistics.evidence import Evidence
from softpref.training import refits
from softpref.training.samplers import EpochSampler
from tests.distributed.scoring import scoring
from tests.tiny import random_pairs, tiny_model, with_lora, without_float32
from tests.toy import toy_pairs, toy_trainer

NOISY, CLEAN, SIZE = 13, 5, 3
GLOBAL_BATCH = 8
TWENTY_STEPS = {"max_steps": 20, "learning_rate": 1e-2, "warmup_steps": 0}
SHARDED = ("sharded-", "full-", "shards", "refused")
"""Begin the names of what older libraries cannot do."""
FULL = {"learning_rate": 1e-3, "max_grad_norm": 0.1}
"""Of runs of all weights: the gradient's norm is clipped in most steps."""
EIGHT = {"max_steps": 8}
"""For variants of the run that is compared over twenty."""


def learner() -> MetaLearner:
    torch.manual_seed(5)
    return MetaLearner(hidden=16).double()


def step(
    ranks: Ranks, *, noisy: int = NOISY, shard: bool = False, engine: str = "auto"
) -> dict[str, Tensor]:
    """One taught step of an adapter in float64."""
    policy = with_lora(without_float32(tiny_model(attention="sdpa")))
    if shard:
        shard_base(policy)
    return taught(policy, ranks, noisy, engine)


def full_step(
    home: Path, ranks: Ranks, *, noisy: int = NOISY, engine: str = "auto", tied: bool = False
) -> dict[str, Tensor]:
    """One taught step of all weights in float64, in shards where there are several processes."""
    sizes = {"dtype": torch.float64, "tie_word_embeddings": tied, "vocab_size": 36 if tied else 35}
    if ranks.count == 1:
        return taught(without_float32(tiny_model(attention="sdpa", **sizes)), ranks, noisy, engine)
    policy = without_float32(sharded_model(home, **sizes))
    reduce_gradients(policy)
    done = taught(policy, ranks, noisy, engine)
    assert all(isinstance(p, DTensor) for p in trainable(policy))
    return done


def taught(policy: torch.nn.Module, ranks: Ranks, noisy: int, engine: str) -> dict[str, Tensor]:
    """A taught step: gradients, loss, and φ after plain descent on it."""
    collate = partial(make_batch, head_positions="scored")
    pairs, clean = random_pairs(noisy, seed=1), random_pairs(CLEAN, seed=2)
    batches, trusted = (
        [collate(part) for part in length_buckets(some, SIZE, ranks)] for some in (pairs, clean)
    )
    choice = choose_engine(engine, policy, collate(pairs[:SIZE]), StepSize.of(batches))
    meta_learner = learner()
    before = [p.detach().clone() for p in meta_learner.parameters()]
    moved, meta_loss = mspo_step(
        policy, meta_learner, torch.optim.SGD(meta_learner.parameters(), lr=1.0),
        [choice.make_jacobian(policy, batch, "response") for batch in batches], trusted,
        Objective(GEOMETRIC, 0.5, ranks), 0.1, choice.make_pullback,
    )  # fmt: skip
    after = meta_learner.parameters()
    return {
        "gradient": torch.cat([whole(dense(g)).flatten() for g in moved.gradient]),
        "meta_gradient": torch.cat(
            [(b - a).detach().flatten() for a, b in zip(after, before, strict=True)]
        ),
        "loss": moved.loss[None],
        "meta_loss": meta_loss[None],
    }


def shard_base(policy: torch.nn.Module) -> None:
    """Shard every frozen tensor over the processes; adapters stay whole on each."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    adapters = set(trainable(policy))
    for layer in policy.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=adapters)
    fully_shard(policy, mesh=mesh, ignored_params=adapters)
    for parameter in policy.parameters():
        assert isinstance(parameter, DTensor) == (parameter not in adapters)


def sharded_model(home: Path, dtype: torch.dtype, **sizes) -> torch.nn.Module:
    """The same model as `tiny_model`, sharded by transformers as it loads it."""
    place = home / "model"
    tiny_model(dtype=dtype, attention="sdpa", **sizes).save_pretrained(place)  # the first does
    distributed.barrier()
    config = DistributedConfig(fsdp_size=distributed.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, distributed_config=config)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def run(
    home: Path, ranks: Ranks, *, dtype: torch.dtype, shard: bool = False, **options
) -> dict[str, Tensor]:
    """Twenty steps of a run, the last batch of an epoch smaller than the ranks are many."""
    options = TWENTY_STEPS | {
        "tuning": "lora", "per_device_train_batch_size": GLOBAL_BATCH // ranks.count,
        "gradient_accumulation_steps": 1,
    } | options  # fmt: skip
    if options["tuning"] == "lora":
        options = {"lora_target_modules": "all-linear"} | options
    model = sharded_model(home, dtype) if shard else tiny_model(dtype=dtype, attention="sdpa")
    if dtype == torch.float64:
        model = without_float32(model)
    trainer = toy_trainer(
        home, model=model, train=toy_pairs(83, flip_every=3), evaluation=toy_pairs(9, seed=2),
        **options,
    )  # fmt: skip
    assert trainer.ranks.count == ranks.count
    if dtype == torch.float64 and trainer.teacher:
        trainer.start.labeller.double()  # else its rounding is what AdamW makes steps of
    trainer.train()
    for name, parameter in trainer.policy.named_parameters():
        if ".layers." in name or options["tuning"] == "full":
            assert isinstance(parameter, DTensor) == (shard and "lora_" not in name)
    for state in trainer.optimizer.state.values():
        assert isinstance(state["exp_avg"], DTensor) == (shard and options["tuning"] == "full")
    labels = trainer.label_pairs()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    taught = {}
    if trainer.teacher:
        phi = trainer.teacher.meta_learner.parameters()
        taught = {
            "phi": torch.cat([p.detach().flatten() for p in phi]),
            "soft_label": torch.tensor(labels["soft_label"]),
        }
    return taught | {
        "weights": torch.cat([whole(p.detach()).flatten() for p in trainable(trainer.policy)]),
        "losses": torch.tensor(losses, dtype=torch.float64),
        "step": torch.tensor([-1 if step is None else step for step in labels["step"]]),
    }


def by_evidence(home: Path, ranks: Ranks) -> dict[str, Tensor]:
    """A run whose labeller is fitted on the way, on evidence that is heard however weak it is."""
    asked, Evidence.speaks = Evidence.speaks, True
    often, refits.NOISY_A_TRUSTED = refits.NOISY_A_TRUSTED, 1
    try:
        return run(home, ranks, dtype=torch.float64, method="evidence", max_steps=10)
    finally:
        Evidence.speaks, refits.NOISY_A_TRUSTED = asked, often


def counted(home: Path, ranks: Ranks, *, shard: bool = False) -> dict[str, Tensor]:
    """Bytes of one step as they were handed over, and as the calculator foretells them."""
    trainer = toy_trainer(
        home, model=sharded_model(home, torch.float32) if shard else None, max_steps=4,
        tuning="lora", lora_target_modules="all-linear", logging_steps=100,
        gradient_accumulation_steps=1, per_device_train_batch_size=GLOBAL_BATCH // ranks.count,
    )  # fmt: skip
    last, before = bytes_of_steps(trainer)[:-3:-1]
    policy = trainer.policy
    head = [*policy.get_output_embeddings().parameters(),
            *policy.get_base_model().model.norm.parameters()]  # fmt: skip
    foretold = scaling.Step(
        numbers(policy.parameters()), numbers(trainable(policy)), GLOBAL_BATCH,
        head=numbers(head), meta_learner=numbers(trainer.start.labeller.parameters()),
    )  # fmt: skip
    shards = foretold.shards(ranks.count, bytes_each=4) if shard else 0
    return {
        "counted": torch.tensor([a - b for a, b in zip(last, before, strict=True)]),
        "foretold": torch.tensor([foretold.summed(), foretold.gathered(ranks.count), shards, 0]),
    }


def full_counted(home: Path, ranks: Ranks, *, engine: str) -> dict[str, Tensor]:
    """The same of all weights in shards."""
    trainer = toy_trainer(
        home, model=sharded_model(home, torch.float32), max_steps=3, engine=engine,
        gradient_accumulation_steps=1, per_device_train_batch_size=GLOBAL_BATCH // ranks.count,
        logging_steps=100,
    )  # fmt: skip
    seen = bytes_of_steps(trainer)
    trained = numbers(trainable(trainer.policy))
    v = numbers(trainer.start.labeller.parameters())
    embedding = numbers(trainer.policy.get_input_embeddings().parameters())
    foretold = scaling.Step(trained, trained, GLOBAL_BATCH, embedding=embedding, meta_learner=v)
    return {
        "counted": torch.tensor([a - b for a, b in zip(seen[-1], seen[-2], strict=True)]),
        "foretold": torch.tensor(
            [foretold.summed_in_shards(), foretold.gathered(ranks.count),
             foretold.all_shards(ranks.count, engine), foretold.reduced()]
        ),
    }  # fmt: skip


def bytes_of_steps(trainer) -> list[list[int]]:
    """Train; return what had been handed over after each step, bytes."""
    counter = scaling.Counter()
    seen: list[list[int]] = []
    note = TrainerCallback()
    note.on_step_end = lambda *_, **__: seen.append(list(counter.bytes.values()))
    trainer.add_callback(note)
    trainer.train()
    return seen


def numbers(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def drift(ranks: Ranks) -> dict[str, Tensor]:
    """A number that differs on one rank ends all of them."""
    same, other = torch.ones(3), torch.full((2,), float(ranks.rank == ranks.count - 1))
    ranks.require_alike("same", [same])
    try:
        ranks.require_alike("other", [same, other])
    except DriftError as error:
        return {"found": torch.tensor([int("other differs" in str(error))])}
    return {"found": torch.tensor([0])}


def shards(home: Path) -> dict[str, Tensor]:
    """What is said of a sharded policy, after a pass that failed, and of the same policy whole."""
    batch = make_batch(random_pairs(4, seed=1))
    sharded = sharded_model(home, torch.float32)

    def fail(*_):
        raise ArithmeticError

    hook = sharded.model.layers[1].register_forward_pre_hook(fail)
    try:
        sharded(batch.input_ids)
    except ArithmeticError:
        assert not all(isinstance(p, DTensor) for p in sharded.parameters())
        reshard_after_error(sharded)
    hook.remove()
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    whole = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    graphs, hashes = [], []
    for policy in (sharded, whole):
        hashes.append(list(fingerprint_weights(policy).encode()))
        policy.requires_grad_(False)
        policy = with_lora(policy)
        for _ in range(2):  # what the first pass gathers may be kept for the second
            graphs.append(graph_gib(policy, batch, StepSize.of([batch])))
    assert graphs[0] == graphs[1]
    return {"graphs": torch.tensor(graphs[1:3]), "hashes": torch.tensor(hashes)}


def poisoned(
    home: Path, ranks: Ranks, *, shard: bool = False, tuning: str = "lora"
) -> dict[str, Tensor]:
    """A pair whose reference is not finite lies in one rank's share: none takes the step.

    It is of the epoch's last step, which not all ranks have as many pairs of.
    """
    trainer = toy_trainer(
        home, model=sharded_model(home, torch.float32) if shard else None,
        train=toy_pairs(45, flip_every=3), tuning=tuning,
        max_steps=6, max_skipped_steps=9, gradient_accumulation_steps=1,
        per_device_train_batch_size=GLOBAL_BATCH // ranks.count,
    )  # fmt: skip
    said: list[str] = []
    skip = trainer._skipped.skip
    trainer._skipped.skip = lambda step, why, culprits: (said.extend(culprits), skip(step, why, []))
    *_, last = EpochSampler(len(trainer.pairs), trainer.args.data_seed)
    uid = trainer.pairs[last]["uid"]
    collate = trainer.start.layout.collate

    def poison(pairs):
        return collate([p | {"ref_chosen_logp": float("nan")} if p["uid"] == uid else p
                        for p in pairs])  # fmt: skip

    layout = dataclasses.replace(trainer.start.layout, collate=poison)
    trainer.start = dataclasses.replace(trainer.start, layout=layout)
    trainer._steps = dataclasses.replace(trainer._steps, collate=poison)
    trainer.train()
    return {
        "skipped": torch.tensor([trainer._skipped.count]),
        "named": torch.tensor([int(said == [uid] * trainer._skipped.count)]),
        "weights": torch.cat([whole(p.detach()).flatten() for p in trainable(trainer.policy)]),
    }


def apart(home: Path, ranks: Ranks) -> dict[str, Tensor]:
    """Processes that were given other pairs, and ones that were told another β."""
    said = []
    for seed, beta in ((ranks.rank, 0.1), (0, 0.1 + ranks.rank)):
        try:
            toy_trainer(home / str(beta), train=toy_pairs(40, seed=seed), beta=beta).train()
        except UsageError as error:
            said.append(str(error))
    words = ("the data differs between processes", "the run differs between processes")
    return {"said": torch.tensor([int(w in s) for w, s in zip(words, said, strict=True)])}


def refused(home: Path) -> dict[str, Tensor]:
    """An adapter whose gradients go pair by pair, on a sharded base."""
    model = sharded_model(home, torch.float32)
    try:
        toy_trainer(home, model=model, tuning="lora", lora_target_modules=["embed_tokens"])
    except UsageError as error:
        return {"said": torch.tensor([int("adapt linear layers only" in str(error))])}
    return {"said": torch.tensor([0])}


def cases(home: Path, ranks: Ranks) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Return all cases by name; those of one process are what the others must equal."""
    some = {
        "step": lambda: step(ranks),
        "few": lambda: step(ranks, noisy=1),
        "float64": lambda: run(home / "a", ranks, dtype=torch.float64),
        "float32": lambda: run(home / "b", ranks, dtype=torch.float32),
        "accumulated": lambda: run(
            home / "c", ranks, dtype=torch.float64, gradient_accumulation_steps=2, max_steps=6
        ),
    }
    if ranks.count > 1:
        some["counted"] = lambda: counted(home / "h", ranks)
        some["sharded-counted"] = lambda: counted(home / "k", ranks, shard=True)
        some["drift"] = lambda: drift(ranks)
        some["sharded-step"] = lambda: step(ranks, shard=True)
        some["sharded-float64"] = lambda: run(home / "o", ranks, dtype=torch.float64, shard=True)
        for engine in ("graph", "recompute"):
            some[f"full-counted-{engine}"] = lambda engine=engine: full_counted(
                home / f"y-{engine}", ranks, engine=engine
            )
    shard = ranks.count > 1
    some["full-step"] = lambda: full_step(home / "s", ranks, engine="recompute")
    some["full-step-graph"] = lambda: full_step(home / "t", ranks, engine="graph", tied=True)
    some["full-float64"] = lambda: run(
        home / "u", ranks, dtype=torch.float64, shard=shard, tuning="full", **FULL,
        eval_strategy="steps", eval_steps=9,
    )  # fmt: skip
    some = some if ranks.count == 4 else some | variants(home, ranks)
    if can_shard() or ranks.count == 1:
        return some
    return {name: case for name, case in some.items() if not name.startswith(SHARDED)}


def variants(home: Path, ranks: Ranks) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Return the cases that two processes are enough for."""
    more = {
        **{f"step-{name}": lambda name=name: step(ranks, engine=name)
           for name in ("graph", "recompute", "double_backward")},
        **{name: lambda name=name: run(
            home / name, ranks, dtype=torch.float64, method=name, **EIGHT
        ) for name in ("dpo", "dr_dpo", "re_po")},
        "evidence": lambda: by_evidence(home / "r", ranks),
        "poisoned": lambda: poisoned(home / "g", ranks),
        "full-poisoned": lambda: poisoned(
            home / "z", ranks, shard=ranks.count > 1, tuning="full"
        ),
        "full-float32": lambda: run(
            home / "v", ranks, dtype=torch.float32, shard=ranks.count > 1, tuning="full",
            engine="graph", **FULL,
        ),
        "full-dpo": lambda: run(
            home / "w", ranks, dtype=torch.float64, shard=ranks.count > 1, tuning="full",
            method="dpo", **FULL | {"max_steps": 4},
        ),
        "full-accumulated": lambda: run(
            home / "x", ranks, dtype=torch.float64, shard=ranks.count > 1, tuning="full",
            activation_checkpointing=True, per_device_train_batch_size=1, engine="graph",
            gradient_accumulation_steps=2 * GLOBAL_BATCH // ranks.count, **FULL | {"max_steps": 3},
        ),
    }  # fmt: skip
    if ranks.count == 1:
        more["as long as dpo"] = lambda: run(home / "d", ranks, dtype=torch.float64, **EIGHT)
    else:
        more |= {f"sharded-step-{name}": lambda name=name: step(ranks, shard=True, engine=name)
                 for name in ("graph", "recompute")}  # fmt: skip
        more["sharded-float32"] = lambda: run(
            home / "p", ranks, shard=True, dtype=torch.float32, engine="graph",
            eval_strategy="steps", eval_steps=3,
        )  # fmt: skip
        # Parts of one pair each, where ranks may have one and two.
        more["sharded-accumulated"] = lambda: run(
            home / "q", ranks, shard=True, dtype=torch.float64, engine="graph", max_steps=6,
            activation_checkpointing=True, per_device_train_batch_size=1,
            gradient_accumulation_steps=2 * GLOBAL_BATCH // ranks.count,
        )  # fmt: skip
        more["sharded-dpo"] = lambda: run(
            home / "l", ranks, dtype=torch.float64, shard=True, method="dpo", **EIGHT
        )
        more["sharded-poisoned"] = lambda: poisoned(home / "i", ranks, shard=True)
        more["shards"] = lambda: shards(home / "j")
        more["apart"] = lambda: apart(home / "n", ranks)
        more["refused"] = lambda: refused(home / "m")
    return more


def results(home: Path, ranks: Ranks) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield what every case comes to, by its name."""
    for name, case in cases(home, ranks).items():
        yield name, case()
    if ranks.count < 4:
        yield from scoring(home / "scoring", ranks)


def main() -> None:
    home = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    ranks = Ranks.here(torch.device("cpu"))
    assert ranks.count == int(sys.argv[2]), f"{ranks.count} processes, {sys.argv[2]} asked for"
    for name, found in results(home, ranks):
        save_file(found, home / f"{name}-{ranks.rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
