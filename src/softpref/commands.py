"""What each command is for, and where its options are declared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command's help.

    Attributes:
        sentence: what it does.
        examples: two calls, without `softpref`.
        options: the dataclasses of its options, MODULE:CLASS.
        positional: the arguments before the options.
    """

    sentence: str
    examples: tuple[str, str]
    options: tuple[str, ...]
    positional: str = ""


_JUDGE = "softpref.judging.options:JudgeOptions"

COMMAND_HELP: dict[str, Command] = {
    "demo": Command(
        "Run the whole workflow on a synthetic world, on a CPU, in minutes.",
        ("demo --output runs/demo", "demo --output runs/clean --noise_rate 0"),
        ("softpref.study.demo:DemoOptions",),
    ),
    "sft": Command(
        "Fine-tune a model on the chosen responses of preference pairs.",
        (
            "sft --model HuggingFaceTB/SmolLM2-135M --train sft.jsonl --output runs/sft",
            "sft --model runs/base --train a.jsonl b.jsonl --lora_r 16 --output runs/sft",
        ),
        ("softpref.training.sft:SFTFiles", "softpref.training.sft:SFTOptions"),
    ),
    "inject": Command(
        "Flip labels at a known rate and keep the truth in the column `is_flipped`.",
        (
            "inject --input pairs.jsonl --rate 0.4 --output noisy.jsonl",
            "inject --input pairs.jsonl --kind difficulty --model runs/sft --output noisy.jsonl",
        ),
        ("softpref.models.inject:InjectOptions",),
    ),
    "train": Command(
        "Align a model on preference pairs whose labels cannot be trusted.",
        (
            "train --model runs/sft --train noisy.jsonl --clean clean.jsonl --output runs/mspo",
            "train --model runs/sft --train noisy.jsonl --method dpo --output runs/dpo",
        ),
        ("softpref.training.align:AlignFiles", "softpref.training.config:MSPOConfig"),
    ),
    "audit": Command(
        "Estimate how reliable each label of a preference set is.",
        (
            "audit --model runs/sft --data pairs.jsonl --clean 150 --output runs/audit",
            "audit --run runs/mspo --output runs/audit --export drop",
        ),
        ("softpref.auditing.options:AuditOptions", "softpref.judging.options:OptionalJudge"),
    ),
    "generate": Command(
        "Write responses of a model, loaded here or behind a server, to prompts.",
        (
            "generate --model runs/mspo --prompts test.jsonl --output mspo.jsonl",
            "generate --model NAME --base_url http://localhost:8000/v1 --prompts test.jsonl "
            "--output mspo.jsonl",
        ),
        ("softpref.judging.generate_options:GenerateOptions",),
    ),
    "judge": Command(
        "Compare two sets of responses with a judge, or measure the judge itself.",
        (
            "judge --responses mspo.jsonl --baseline sft.jsonl --judge_model gpt-4o-mini "
            "--output runs/judge",
            "judge --check pairs.jsonl --judge reward_model --judge_model DIR --output runs/check",
        ),
        ("softpref.judging.judge:JudgeFiles", _JUDGE),
    ),
    "compare": Command(
        "Compare win rates of several methods, with intervals and checks of the judge.",
        (
            "compare --responses dpo.jsonl mspo.jsonl --baseline sft.jsonl "
            "--judge_model gpt-4o-mini --output runs/compare",
            "compare --responses mspo=a.jsonl mspo=b.jsonl --baseline sft.jsonl "
            "--judge reward_model --judge_model DIR --output runs/compare",
        ),
        ("softpref.judging.compare:CompareOptions", _JUDGE),
    ),
    "study": Command(
        "Reproduce a table or figure of the paper as a grid of runs.",
        ("study table1 --output runs/study", "study table1 --output runs/study --dry_run"),
        ("softpref.study.choices:StudyOptions",),
        positional="TARGET",
    ),
    "bench": Command(
        "Time a training step, or a whole command, against TRL's on this machine.",
        ("bench --preset cpu --json bench.json", "bench --whole --json whole.json"),
        ("softpref.bench.benchmark:BenchOptions",),
    ),
    "merge": Command(
        "Merge a run's adapter into its base model, for tools that read plain models.",
        (
            "merge --run runs/mspo --output runs/merged",
            "merge --run runs/mspo --dtype bfloat16 --output runs/merged",
        ),
        ("softpref.training.merging:MergeOptions",),
    ),
    "push": Command(
        "Upload a finished run or an audit's cleaned data to the Hugging Face hub.",
        (
            "push runs/mspo ORGANIZATION/my-model --private",
            "push runs/audit ORGANIZATION/my-pairs --private",
        ),
        ("softpref.publishing:PushOptions",),
        positional="RUN|AUDIT REPO",
    ),
    "env": Command(
        "Show versions and devices, and how train would run on this machine.",
        ("env --model runs/sft", "env --accelerate gpus > gpus.yaml"),
        ("softpref.training.environment:EnvOptions",),
    ),
}


@dataclass(frozen=True)
class LibraryOption:
    """An option of transformers' or TRL's trainer as `--help` shows it."""

    group: str
    text: str
    metavar: str | None = None
    beside: str | None = None  # shown only by commands with that option


LIBRARY_OPTIONS = {
    "learning_rate": LibraryOption("optimizer", "Peak learning rate."),
    "lr_scheduler_type": LibraryOption(
        "optimizer", "Learning-rate schedule, such as linear or cosine.", "NAME"
    ),
    "num_train_epochs": LibraryOption("optimizer", "Passes over the data."),
    "max_steps": LibraryOption("optimizer", "Steps to train, instead of --num_train_epochs."),
    "warmup_steps": LibraryOption("optimizer", "Warm-up steps; below 1, a share of all steps."),
    "weight_decay": LibraryOption("optimizer", "Weight decay."),
    "per_device_train_batch_size": LibraryOption("optimizer", "Rows per micro-batch."),
    "gradient_accumulation_steps": LibraryOption("optimizer", "Micro-batches per step."),
    "max_length": LibraryOption("data", "Maximum tokens in a row; longer rows are cut."),
    "logging_steps": LibraryOption(
        "output", "Steps between log lines; below 1, a share of all steps."
    ),
    "eval_strategy": LibraryOption(
        "output", "When to measure --eval on the way: no, steps or epoch.", "NAME", "eval"
    ),
    "eval_steps": LibraryOption(
        "output", "Steps between evaluations; default: as --logging_steps.", beside="eval"
    ),
    "save_steps": LibraryOption(
        "output", "Steps between checkpoints; below 1, a share of all steps."
    ),
    "save_total_limit": LibraryOption("output", "Checkpoints to keep; older ones are deleted."),
    "report_to": LibraryOption(
        "output", "Trackers to log to: tensorboard, wandb, trackio and others.", "NAME"
    ),
    "disable_tqdm": LibraryOption("output", "Show no progress bars."),
    "bf16": LibraryOption("hardware", "Train in bfloat16."),
    "use_cpu": LibraryOption("hardware", "Use the CPU even if there is an accelerator."),
    "per_device_eval_batch_size": LibraryOption(
        "hardware", "Rows per batch of a scoring pass.", beside="eval"
    ),
    "activation_checkpointing": LibraryOption(
        "hardware", "Recompute activations to save memory."
    ),
    "trust_remote_code": LibraryOption("other", "Run code that comes with the model."),
    "seed": LibraryOption("other", "Seed of all random draws."),
}  # fmt: skip
"""Options that `--help` shows beside softpref's own; `--help_all` shows the others."""
