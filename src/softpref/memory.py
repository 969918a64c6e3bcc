"""Messages for out-of-memory errors, by command."""

import re

_OUT_OF_MEMORY = re.compile("out of memory|(can't|cannot) allocate memory|not enough memory", re.I)
_BATCH = (
    "--per_device_train_batch_size (raise --gradient_accumulation_steps by the same factor to keep "
    "the step size)"
)
LOWER = {
    "train": f"lower {_BATCH}, --per_device_eval_batch_size, --keep_budget_gib or --max_length; or "
    "set --activation_checkpointing true, --bf16 true, --tuning lora or --load_in_4bit true",
    "sft": f"lower {_BATCH} or --max_length; or set --activation_checkpointing true, --bf16 true "
    "or --lora_r 16",
    "audit": "lower --batch_size or --max_length; or set --bf16 true or --load_in_4bit true",
    "generate": "lower --batch_size or --max_new_tokens; or set --bf16 true or --load_in_4bit true",
    "judge": "lower --judge_batch_size, or set --judge_bf16 true or --judge_load_in_4bit true",
    "compare": "lower --judge_batch_size, or set --judge_bf16 true or --judge_load_in_4bit true",
    "study": "lower --jobs, the number of runs at once",
    "inject": "lower --max_length, or give a smaller --model",
}
"""Remedies by command: options that reduce memory use."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that host or device memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_OUT_OF_MEMORY.search(str(error)))


def memory_message(command: str, error: BaseException) -> str:
    """Return which memory ran out and which options to lower."""
    what = "GPU memory" if re.search("CUDA|HIP|MPS|XPU", str(error)) else "memory"
    remedy = LOWER.get(command, "close other programs, or use a machine with more")
    return f"not enough {what}: {remedy}. Completed work is kept."
