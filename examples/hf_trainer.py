"""MeZO under the Hugging Face Trainer: change the import and the class names, keep the script.

Runs offline in seconds: a small random model learns to answer in the language of the question.

    python examples/hf_trainer.py
    torchrun --nproc_per_node=2 examples/hf_trainer.py        # the same script on two processes
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from mezo import MeZOConfig, MeZOTrainer  # was: from transformers import TrainingArguments, Trainer

torch.manual_seed(0)
shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
config = LlamaConfig(vocab_size=32, num_attention_heads=2, num_labels=2, pad_token_id=0, **shape)
model = LlamaForSequenceClassification(config)

# "Languages" are halves of the vocabulary; put your tokenized data set here.
labels = torch.randint(0, 2, (256,)).tolist()
rows = [{"input_ids": torch.randint(1, 16, (8,)) + 15 * y, "labels": y} for y in labels]


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


with tempfile.TemporaryDirectory() as folder:
    args = MeZOConfig(
        folder,
        max_steps=200,
        per_device_train_batch_size=16,
        learning_rate=3e-3,  # for a model this small; 1e-7 to 1e-6 for a pretrained one
        logging_steps=100,
        eval_strategy="steps",
        eval_steps=100,
        save_strategy="no",
        report_to="none",
    )
    data = {"train_dataset": rows[:192], "eval_dataset": rows[192:]}
    trainer = MeZOTrainer(model, args, compute_metrics=accuracy, **data)
    trainer.train()
    print(trainer.evaluate())
