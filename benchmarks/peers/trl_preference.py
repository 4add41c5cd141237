"""TRL's DPO and KTO on the concierge, in TRL's own environment: a job a line on standard input, an answer a line on standard output.

    {"method": "dpo" | "kto", "policy": folder, "rows": JSON lines, "out": folder, "seed": 0,
     "settings": {"learning_rate", "beta", "epochs", "batch", "thumbs"}}     ->     {"rows": 312, "cpu_seconds": 9.1}

`rows` are what `feedback/export.py` writes, except that a preference file may have unpaired rows in it: a thumb up and a thumb down on
answers to one prompt then make a pair, too. One process trains many jobs, because importing TRL takes half a minute.
"""

import json
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

RANK, ALPHA = 8, 16


def pairs(rows, thumbs):
    """Choices as they are; with `thumbs` also every answer with a thumb up over every one with a thumb down, prompt by prompt."""
    found = [row for row in rows if "chosen" in row]
    if thumbs:
        rated = defaultdict(lambda: ([], []))
        for row in rows:
            if "label" in row:
                rated[json.dumps(row["prompt"])][row["label"]].append(row["completion"])
        for prompt, (down, up) in rated.items():
            found += [{"prompt": json.loads(prompt), "chosen": c, "rejected": r} for c in up for r in down if c != r]
    return found


def balance(rows):
    """KTO's weights with which good and bad count the same in all, as TRL advises."""
    good = sum(row["label"] for row in rows)
    bad = len(rows) - good
    if not good or not bad:
        return {}
    return {"desirable_weight": max(1.0, bad / good), "undesirable_weight": max(1.0, good / bad)}


def run(job, scratch):
    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    settings, dpo = job["settings"], job["method"] == "dpo"
    rows = pairs(rows, settings.get("thumbs", False)) if dpo else rows
    random.Random(job["seed"]).shuffle(rows)  # KTO takes its rows in order
    config, trainer = (DPOConfig, DPOTrainer) if dpo else (KTOConfig, KTOTrainer)
    args = config(
        **({} if dpo else balance(rows)),
        output_dir=scratch,
        learning_rate=settings["learning_rate"],
        beta=settings["beta"],
        num_train_epochs=settings["epochs"],
        per_device_train_batch_size=settings["batch"],
        seed=job["seed"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32, local_files_only=True)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(job["policy"], local_files_only=True)
    training = trainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora)
    training.train()
    training.model.save_pretrained(job["out"])
    return len(rows)


def main():
    torch.set_num_threads(1)  # as the cycle does for so small a policy
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is no answer
    for line in sys.stdin:
        started = time.process_time()
        with tempfile.TemporaryDirectory() as scratch:
            rows = run(json.loads(line), scratch)
        print(json.dumps({"rows": rows, "cpu_seconds": round(time.process_time() - started, 2)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
