"""TRL 1.12's PPO as a contestant: `python -m benchmarks.peers.trl_ppo spec.json result.json`, in TRL's own environment.

As it comes the value model is a second copy of the backbone, trained in full; and as TRL counts a step of its optimiser in micro-batches
of the whole batch, minibatches of the asked size need micro-batches of that size. Thrifty, with two things that TRL neither offers nor
forbids: LoRA for the value model, and minibatches cut into micro-batches, because accelerate is told to count those of a minibatch.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import trl.experimental.ppo.ppo_trainer as module
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.peers.meter import Meter, Reached
from benchmarks.peers.rewards import Reward


class Reader(torch.nn.Module):
    """Stands where TRL wants a backbone: its last "hidden state" is the reward of the whole sequence, at every token."""

    def __init__(self, reward: Reward, meter: Meter) -> None:
        super().__init__()
        self.reward, self.meter = reward, meter

    def forward(self, input_ids, attention_mask, **_):
        pairs = [self.reward.split(ids[seen].tolist()) for ids, seen in zip(input_ids, attention_mask.bool(), strict=True)]
        scores = [self.reward.one(prompt, reply) for prompt, reply in pairs]
        self.meter.note("score", scores)
        self.meter.note("reply_tokens", [len(reply) for _, reply in pairs])
        self.meter.note("finished", [float(reply[-1:] == [self.reward.end]) for _, reply in pairs])
        self.meter.lap("score")
        self.meter.check()
        scores_BS1 = torch.tensor(self.reward.given(scores))[:, None, None].expand(*input_ids.shape, 1)
        return SimpleNamespace(hidden_states=[scores_BS1])


class RewardModel(torch.nn.Module):
    """What TRL takes for a reward model."""

    base_model_prefix = "reader"

    def __init__(self, reward: Reward, meter: Meter) -> None:
        super().__init__()
        self.reader = Reader(reward, meter)

    def score(self, states):
        return states


class Clock(TrainerCallback):
    """Ends an iteration."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_log(self, args, state, control, logs=None, **_):
        self.meter.note("kl_nats", [logs["objective/kl"]])

    def on_step_end(self, args, state, control, **_):
        self.meter.lap("train")
        self.meter.close()


def timed(meter: Meter) -> None:
    """Laps after generation and where the first forward pass with gradients begins: what lies between is scoring."""
    generation, forward = module.batch_generation, module.forward
    scoring = False

    def batch_generation(*args, **kwargs):
        nonlocal scoring
        found = generation(*args, **kwargs)
        meter.lap("generate")
        scoring = True
        return found

    def forward_pass(*args, **kwargs):
        nonlocal scoring
        if scoring and torch.is_grad_enabled():
            meter.lap("score")
            scoring = False
        return forward(*args, **kwargs)

    module.batch_generation, module.forward = batch_generation, forward_pass


def value_model(spec):
    found = AutoModelForSequenceClassification.from_pretrained(spec["model"], num_labels=1, dtype=torch.float32)
    if spec["settings"]["thrifty"]:
        lora = LoraConfig(r=spec["rank"], lora_alpha=spec["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="SEQ_CLS")
        found = inject_adapter_in_model(lora, found)
        found.score.requires_grad_(True)
    return found


def arguments(spec):
    micro = spec["minibatch"] // spec["cuts"] if spec["settings"]["thrifty"] else spec["rollouts"]
    return PPOConfig(
        output_dir=spec["folder"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # slower, and ours has none either
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        num_sample_generations=0,
        logging_steps=1,
        seed=spec["seed"],
        lr_scheduler_type="constant",
        learning_rate=spec["learning_rate"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=spec["rollouts"] // micro,
        num_mini_batches=spec["rollouts"] // spec["minibatch"],
        num_ppo_epochs=spec["epochs"],
        total_episodes=spec["iterations"] * spec["rollouts"],
        local_rollout_forward_batch_size=spec["rollouts"],
        response_length=spec["max_tokens"],
        temperature=spec["temperature"],
        stop_token="eos",
        cliprange=spec["clip"],
        gamma=1.0,
        lam=spec["gae_lambda"],
        kl_coef=spec["kl_coef"],
    )


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    meter = Meter(spec["target"])
    register_optimizer_step_post_hook(meter.updated)
    np.random.seed(spec["seed"])
    torch.manual_seed(spec["seed"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    # TRL takes every padding token for padding, also where it ends a turn of the prompt.
    tokenizer.pad_token = spec["pad_token"]
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    reward = Reward(spec, lambda ids: tokenizer.decode(ids, skip_special_tokens=True), tokenizer.eos_token_id)
    copies = -(-2 * spec["rollouts"] // len(spec["prompts"]))
    trainer = PPOTrainer(
        arguments(spec),
        processing_class=tokenizer,
        model=model,
        ref_model=None,
        reward_model=RewardModel(reward, meter),
        train_dataset=Dataset.from_dict({"input_ids": spec["prompts"] * copies}),
        value_model=value_model(spec),
        eval_dataset=Dataset.from_dict({"input_ids": spec["prompts"][:1]}),
        callbacks=[Clock(meter)],
        peft_config=LoraConfig(
            r=spec["rank"], lora_alpha=spec["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    set_peft_model_state_dict(trainer.policy_model, load_file(Path(spec["adapter"]) / "adapter_model.safetensors"))
    if spec["settings"]["thrifty"]:
        # The end of the prompts' data is no reason for a step in the middle of a minibatch.
        trainer.accelerator.gradient_state.plugin_kwargs.update(num_steps=spec["cuts"], sync_with_dataloader=False)
    timed(meter)
    meter.start()
    with suppress(Reached):
        trainer.train()
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    result = meter.result(trainable=trainable, parameters=sum(p.numel() for p in trainer.model.parameters()))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
