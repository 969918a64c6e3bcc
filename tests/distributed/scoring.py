"""Commands that score, by one process or shared by several: the files they leave, and the work.

Each case returns the bytes of the files, of rank 0 alone, and the tokens that this rank forwarded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from benchmarks.sharing import counting
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from softpref.algorithm.ranks import Ranks
from softpref.auditing.audit import run_audit
from softpref.auditing.options import AuditOptions
from softpref.judging import compare, generate
from softpref.judging.compare import CompareOptions, run_compare
from softpref.judging.generate import run_generate
from softpref.judging.generate_options import GenerateOptions
from softpref.judging.judge import JudgeFiles, run_judge
from softpref.judging.options import JudgeOptions
from softpref.training.output import write_lines
from softpref.world.language import make_tokenizer
from tests.tiny import tiny_model
from tests.toy import toy_pairs

REWARD = JudgeOptions("reward_model", judge_model="reward", judge_batch_size=4)
IMPLICIT = JudgeOptions(
    "implicit_reward", judge_model="other", judge_reference="model", judge_batch_size=4
)
GENERATE = {"model": "model", "prompts": "data.jsonl", "limit": 64, "samples": 2,
            "temperature": 1.0, "max_new_tokens": 4, "batch_size": 4}  # fmt: skip


def prepare(home: Path) -> None:
    """Save models, pairs and responses."""
    tokenizer = make_tokenizer()
    models = {"model": tiny_model(dtype=torch.float32, attention="sdpa"),
              "other": tiny_model(dtype=torch.float32, attention="sdpa", spread=0.3)}  # fmt: skip
    torch.manual_seed(7)
    config = models["model"].config
    config.num_labels = 1
    models["reward"] = AutoModelForSequenceClassification.from_config(config)
    for name, model in models.items():
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    pairs = toy_pairs(96, flip_every=3)
    pairs.to_json(home / "data.jsonl")
    toy_pairs(24, seed=1).to_json(home / "clean.jsonl")
    for name, side in (("ours", "chosen"), ("theirs", "rejected")):
        rows = ({"prompt": row["prompt"], "response": row[side]} for row in pairs.take(64))
        write_lines(home / f"{name}.jsonl", rows)


def audit(ranks: Ranks) -> None:
    """An audit by the model, by a reward model's opinion and by a judge's verdicts."""
    options = AuditOptions(
        model="model", data="data.jsonl", clean="clean.jsonl", output="audit",
        reward_model=["reward"], reference_cache="cache",
    )  # fmt: skip
    run_audit(options, IMPLICIT, ranks)


def interrupted(ranks: Ranks) -> None:
    """Responses of a command that was killed after three rounds, and resumed."""
    written = generate.write_lines

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    generate.write_lines = killed
    with contextlib.suppress(KeyboardInterrupt):
        run_generate(GenerateOptions(**GENERATE, output="resumed.jsonl"), ranks)
    generate.write_lines = written
    if ranks.is_first:
        progress = Path("resumed.jsonl.progress")
        Path("whole.progress").write_bytes(progress.read_bytes())
        progress.write_bytes(b"".join(progress.read_bytes().splitlines(keepends=True)[:14]))
        Path("resumed.jsonl.record.json").unlink()
    run_generate(GenerateOptions(**GENERATE, output="resumed.jsonl"), ranks)


def compared(ranks: Ranks) -> None:
    """Two judges of different kinds, and controls."""
    second = "".join(f"{k}: {v}\n" for k, v in vars(IMPLICIT).items() if k in
                     ("judge", "judge_model", "judge_reference", "judge_batch_size"))  # fmt: skip
    Path(f"second-{ranks.rank}.yaml").write_text(second)
    drawn, compare.save_figure = compare.save_figure, lambda *_: None
    files = CompareOptions(
        ["ours.jsonl"], "theirs.jsonl", "compare", controls=True,
        second_judge=f"second-{ranks.rank}.yaml", reference_cache="compare-cache",
    )  # fmt: skip
    run_compare(files, REWARD, ranks)
    compare.save_figure = drawn


def judged(ranks: Ranks) -> None:
    """A reward model."""
    files = JudgeFiles(
        "ours.jsonl", "theirs.jsonl", output="judge", reference_cache="judge-cache"
    )  # fmt: skip
    run_judge(files, REWARD, ranks)


CASES: dict[str, tuple[Callable[[Ranks], None], tuple[str, ...]]] = {
    "audit": (audit, ("audit/labels.jsonl", "audit/verdicts.jsonl", "audit/cleaned.jsonl")),
    "generate": (interrupted, ("resumed.jsonl", "whole.progress")),
    "judge": (judged, ("judge/verdicts.jsonl", "judge/judge.json")),
    "compare": (compared, ("compare/verdicts.jsonl", "compare/compare.json")),
}  # fmt: skip


def scoring(home: Path, ranks: Ranks) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every case's name and what came of it."""
    home.mkdir(exist_ok=True)
    if ranks.is_first:
        prepare(home)
    ranks.wait()
    with contextlib.chdir(home):
        for name, (case, files) in CASES.items():
            with counting() as tokens:
                case(ranks)
            said = b"".join(Path(file).read_bytes() for file in files) if ranks.is_first else b"-"
            yield name, {
                "files": torch.tensor([*said], dtype=torch.uint8), "tokens": torch.tensor(tokens)
            }  # fmt: skip
            ranks.wait()
