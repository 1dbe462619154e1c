"""Instruction tuning on rows of your own, by TRL's SFTTrainer with MeZO: forward passes alone.

Runs offline in seconds, on the small model that comes with the package. The same from a file:

    mezo sft --model causal-lm --train_file rows.jsonl --use_peft --learning_rate 3e-3
"""

import tempfile

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from mezo import MeZOSFTConfig, MeZOSFTTrainer  # was: from trl import SFTConfig, SFTTrainer
from mezo.models.loading import causal_lm  # a folder; a name on the hub does as well

# Rows in TRL's formats: prompt and completion, or messages, or text. The loss is the completion's.
rows = [
    {"prompt": f"Answer politely. {question}", "completion": " Thank you for asking."}
    for question in ("Is it late?", "Who are you?", "Where is the house?", "What is this?")
]
tokenizer = AutoTokenizer.from_pretrained(causal_lm())
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

with tempfile.TemporaryDirectory() as folder:
    args = MeZOSFTConfig(
        folder,
        max_steps=40,
        per_device_train_batch_size=4,
        learning_rate=5e-4,  # for a model this small; 1e-4 for LoRA on one of 1B and more
        mezo_eps=1e-2,
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        max_length=64,
    )
    trainer = MeZOSFTTrainer(
        AutoModelForCausalLM.from_pretrained(causal_lm()),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", r=8, lora_alpha=16),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("loss of the first steps", losses[0])
    print("loss of the last steps", losses[-1])
