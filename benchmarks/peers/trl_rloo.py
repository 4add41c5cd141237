"""TRL 1.16's RLOO as a contestant: `python -m benchmarks.peers.trl_rloo spec.json result.json`, in TRL's own environment."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from benchmarks.peers.meter import Meter, Reached
from benchmarks.peers.rewards import Reward


class Clocked(RLOOTrainer):
    """Takes laps where TRL goes from one stage to the next."""

    meter: Meter

    def _generate(self, prompts):
        found = super()._generate(prompts)
        self.meter.lap("generate")
        return found

    def _generate_and_score_completions(self, inputs):
        found = super()._generate_and_score_completions(inputs)
        self.meter.lap("score")
        return found


class Clock(TrainerCallback):
    """Ends an iteration after as many optimiser steps as its rollouts are good for."""

    def __init__(self, meter: Meter, steps: int) -> None:
        self.meter, self.steps = meter, steps

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.steps == 0:
            self.meter.lap("train")
            self.meter.close()


def arguments(spec, minibatches):
    return RLOOConfig(
        output_dir=spec["folder"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # slower, and ours has none either
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1_000_000,
        seed=spec["seed"],
        lr_scheduler_type="constant",
        learning_rate=spec["learning_rate"],
        per_device_train_batch_size=spec["minibatch"] // spec["cuts"],
        gradient_accumulation_steps=spec["cuts"],
        steps_per_generation=minibatches * spec["cuts"],
        num_iterations=spec["epochs"],
        max_steps=spec["iterations"] * minibatches * spec["epochs"],
        num_generations=spec["group"],
        max_completion_length=spec["max_tokens"],
        temperature=spec["temperature"],
        epsilon=spec["clip"],
        beta=spec["kl_coef"],
    )


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    meter = Meter(spec["target"])
    register_optimizer_step_post_hook(meter.updated)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    tokenizer.pad_token = spec["pad_token"]
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    reward = Reward(spec, lambda ids: tokenizer.decode(ids, skip_special_tokens=True), tokenizer.eos_token_id)
    for ids, text in zip(spec["prompts"], spec["texts"], strict=True):
        assert tokenizer(text)["input_ids"] == ids, "TRL must see the same prompt tokens"
    ids_of = dict(zip(spec["texts"], spec["prompts"], strict=True))

    def score(prompts, completion_ids, **_):
        scores = [reward.one(ids_of[prompt], reply) for prompt, reply in zip(prompts, completion_ids, strict=True)]
        meter.note("score", scores)
        meter.note("reply_tokens", [len(reply) for reply in completion_ids])
        meter.note("finished", [float(reply[-1:] == [reward.end]) for reply in completion_ids])
        meter.lap("score")
        meter.check()
        return reward.given(scores)

    minibatches = spec["rollouts"] // spec["minibatch"]
    copies = -(-2 * spec["rollouts"] // len(spec["texts"]))
    trainer = Clocked(
        model=model,
        reward_funcs=score,
        args=arguments(spec, minibatches),
        train_dataset=Dataset.from_dict({"prompt": spec["texts"] * copies}),
        processing_class=tokenizer,
        callbacks=[Clock(meter, minibatches * spec["epochs"])],
        peft_config=LoraConfig(
            r=spec["rank"], lora_alpha=spec["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.meter = meter
    set_peft_model_state_dict(trainer.model, load_file(Path(spec["adapter"]) / "adapter_model.safetensors"))
    meter.start()
    with suppress(Reached):
        trainer.train()
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    result = meter.result(trainable=trainable, parameters=sum(p.numel() for p in trainer.model.parameters()))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
