"""Which options are part of a run: one that is resumed with another of them is another run.

The others change nothing that a step does (how it is computed, logged, saved, evaluated), are
fixed, or are told by what else identifies a run: the pairs, the policy, the size of a step.
"""

from softpref.options import facts_of
from softpref.training.config import MSPOConfig

OF_THE_OPTIMIZER = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay",
    "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm",
)  # fmt: skip
OF_THE_STEPS = (
    "max_steps", "num_train_epochs", "seed", "data_seed", "dataloader_drop_last",
    "ignore_data_skip", "max_length", "bf16",
)  # fmt: skip
IDENTITY = (
    *OF_THE_OPTIMIZER,
    *OF_THE_STEPS,
    *(name for name, facts in facts_of(MSPOConfig).items() if facts.get("identity")),
)
"""Of `train`."""
SFT_IDENTITY = (
    *OF_THE_OPTIMIZER, *OF_THE_STEPS,
    "fp16", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices",
    "train_sampling_strategy", "shuffle_dataset", "packing", "packing_strategy", "loss_type",
    "assistant_only_loss", "truncation_mode", "router_aux_loss_coef", "eos_token", "pad_token",
)  # fmt: skip
"""Of `sft`; an older version of a library lacks some."""
