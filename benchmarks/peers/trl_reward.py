"""TRL 1.16's RewardTrainer as a contestant: `python -m benchmarks.peers.trl_reward spec.json result.json`, in TRL's own environment.

LoRA as TRL's own example has it (rank 32, alpha 16, all linear layers, the head trained in full), one epoch, 8 pairs a step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from benchmarks.peers.meter import Meter


@torch.no_grad()
def scores(model, rows, pad, batch=16):
    """One for each sequence; batches hold similar lengths."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = [0.0] * len(rows)
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        width = max(len(rows[i]) for i in some)
        ids = torch.tensor([rows[i] + [pad] * (width - len(rows[i])) for i in some])
        seen = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in some])
        for i, value in zip(some, model(input_ids=ids, attention_mask=seen).logits[:, 0].tolist(), strict=True):
            found[i] = value
    return found


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(spec["seed"])
    meter = Meter()
    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.pad_token = spec["pad_token"]
    model = AutoModelForSequenceClassification.from_pretrained(spec["model"], num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    args = RewardConfig(
        output_dir=spec["folder"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # slower
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=20,
        seed=spec["seed"],
        learning_rate=spec["learning_rate"],
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,  # the same 8 pairs a step in half of the memory
        num_train_epochs=1,
        max_length=None,
    )
    trainer = RewardTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"chosen_ids": spec["train"]["chosen"], "rejected_ids": spec["train"]["rejected"]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=32, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
        ),
    )
    trainer.train()
    train_s = time.perf_counter() - began
    model = trainer.model.eval()
    found = scores(model, spec["test"]["chosen"] + spec["test"]["rejected"], tokenizer.pad_token_id)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    Path(sys.argv[2]).write_text(json.dumps(meter.result(train_s=train_s, scores=found, losses=losses)), encoding="utf-8")


if __name__ == "__main__":
    main()
