"""Align a model with `dpo` and with `evidence` on the same noisy pairs, and compare both.

python examples/align_and_compare.py MODEL PAIRS TRUSTED TEST OUTPUT

TEST holds pairs with right labels: how often does each policy come to prefer the right response?
Its prompts are also answered by all three models, and a judge counts wins against the start.
"""

import sys
from pathlib import Path

from softpref import MSPOConfig, MSPOTrainer
from softpref.judging.compare import CompareOptions, run_compare
from softpref.judging.generate import GenerateOptions, run_generate
from softpref.judging.options import JudgeOptions

model, pairs, trusted, test, output = sys.argv[1:]
home = Path(output)


def answers(policy: str, name: str) -> str:
    """Write a policy's responses to the test prompts, and return the file's name."""
    file = str(home / f"{name}.jsonl")
    run_generate(GenerateOptions(policy, test, file, limit=50, max_new_tokens=32))
    return file


for method in ("dpo", "evidence"):
    config = MSPOConfig(str(home / method), method=method, num_train_epochs=1)
    trainer = MSPOTrainer(model, config, pairs, trusted, test)
    trainer.train()
    accuracy = trainer.evaluate()["eval_rewards/accuracies"]
    trainer.save_model()
    print(f"{method}: prefers the right response in {accuracy:.1%} of the test pairs")

# Convenient, but no outside judge: the `evidence` run scores its own responses. For a chat model
# behind an API give JudgeOptions(judge_model=...); own_judge.py shows a judge of your own.
judge = JudgeOptions(
    judge="implicit_reward", judge_model=str(home / "evidence"), judge_reference=model
)
files = [f"{method}={answers(str(home / method), method)}" for method in ("dpo", "evidence")]
run_compare(CompareOptions(files, answers(model, "start"), str(home / "compared")), judge)
print((home / "compared" / "compare.md").read_text(encoding="utf-8"))
