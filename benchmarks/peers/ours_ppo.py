"""Our PPO or RLOO as a contestant: `python -m benchmarks.peers.ours_ppo spec.json result.json`."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import transformers  # noqa: F401  (part of what imports take, as in the others' processes)
from peft import LoraConfig  # noqa: F401  (the same)
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.peers.meter import Meter, Reached
from benchmarks.peers.rewards import Reward
from trainer.budget import Step
from trainer.config import PPOSettings
from trainer.policy import Policy
from trainer.ppo import Options, train
from trainer.reply import Reply


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    meter = Meter(spec["target"])
    register_optimizer_step_post_hook(meter.updated)
    policy = Policy.load(Path(spec["model"]), rank=spec["rank"], alpha=spec["alpha"], seed=spec["seed"])
    reward = Reward(spec, policy.decode, policy.eos_ids[0])
    shared = ("rank", "alpha", "iterations", "rollouts", "epochs", "minibatch", "learning_rate", "clip", "gae_lambda")
    settings = PPOSettings.model_validate({name: spec[name] for name in shared} | spec["settings"])

    def score(replies: list[Reply], _: Tensor) -> Tensor:
        # The stages' seconds are those that the product itself reports, so no lap is taken here.
        scores = [reward.one(reply.prompt, reply.tokens) for reply in replies]
        meter.note("score", scores)
        meter.note("reply_tokens", [len(reply.tokens) for reply in replies])
        meter.note("finished", [float(reply.finished) for reply in replies])
        meter.check()
        return torch.tensor(reward.given(scores))

    def on_step(step: Step) -> None:
        if step.train_s == 0:
            return  # it ended here, and trained on nothing
        meter.note("kl_nats", [step.kl_nats])
        for name in ("generate_s", "score_s", "train_s"):
            meter.note(name, [getattr(step, name)])
        # The control of a quick run: a process that rests as long as it works must look slower.
        time.sleep(spec.get("slow", 0.0) * (step.generate_s + step.score_s + step.train_s))
        meter.close()
        if len(meter.iterations) == spec["iterations"]:
            raise Reached  # the product measures once more what it releases, the others do not

    asked = [tuple(ids) for ids in spec["prompts"]]
    meter.start()
    with suppress(Reached):
        train(
            policy,
            asked,
            score,
            settings,
            max_tokens=spec["max_tokens"],
            temperature=spec["temperature"],
            seed=spec["seed"],
            options=Options(on_step=on_step),
        )
    trainable = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    result = meter.result(trainable=trainable, parameters=sum(p.numel() for p in policy.model.parameters()))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
