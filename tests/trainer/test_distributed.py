"""Two processes that train one adapter come to what one comes to, whether each holds the backbone or half of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cycle_world import SETTINGS as CYCLE
from cycle_world import make_job
from learning_policy import learning_policy, low_words
from torch import Tensor

from deploy.process import free_port
from trainer import distributed, start
from trainer.budget import Step, Watched
from trainer.config import PPOSettings
from trainer.critic import Warmup
from trainer.cycle import run_cycle
from trainer.policy import Policy
from trainer.ppo import Options, train
from trainer.reply import Reply

PROMPTS = [(2, *range(10, 20), i, i + 1, 3) for i in range(20, 26)]
SETTINGS = PPOSettings(
    iterations=3, rollouts=14, minibatch=7, microbatch_tokens=40, learning_rate=3e-3, kl_target_nats=4.0, critic="adapter"
)
"""Odd numbers, so that the parts of two processes are unequal."""
FIGURES = ("score", "stop_score", "kl_nats", "beta", "ratio", "clipfrac", "approx_kl", "value_loss", "explained_variance", "reply_tokens")


def liked(replies: list[Reply], features_BD: Tensor) -> Tensor:
    """A known preference, and a little of what the backbone makes of a reply."""
    return low_words(replies) + features_BD.mean(1)


class Killed(Exception):
    pass


def kill(step: Step) -> None:
    if step.step == 1:
        raise Killed


def program(folder: Path, out: Path, shard: bool) -> None:
    """What each process runs, a single one too: train, be killed, go on."""
    out.mkdir(exist_ok=True)
    policy = Policy.load(folder, shard=shard)
    base = policy.sample(PROMPTS * 2, max_tokens=6, temperature=0.7, seed=9)
    options = Options(
        watch=lambda replies, features: Watched(float(liked(replies, features).mean()), torch.zeros(1)),
        warmup=Warmup(base, liked(base, policy.features(base))),
        checkpoint=out / "ppo.pt",
    )
    with contextlib.suppress(Killed):
        train(policy, PROMPTS, liked, SETTINGS, max_tokens=6, temperature=0.7, options=replace(options, on_step=kill))
    policy = Policy.load(folder, shard=shard)
    result = train(policy, PROMPTS, liked, SETTINGS, max_tokens=6, temperature=0.7, options=options)
    policy.save(out / f"adapter-{distributed.rank()}")
    held = [getattr(p, "_local_tensor", p).numel() for name, p in policy.model.named_parameters() if ".layers." in name]
    found = {"steps": [asdict(step) for step in result.steps], "replies": [list(reply.tokens) for reply in base], "held": sum(held)}
    (out / f"told-{distributed.rank()}.json").write_text(json.dumps(found))


def told(out: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"told-{rank}.json").read_text())
    return found


def figures(steps: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{name: step[name] for name in FIGURES} for step in steps]


def cycle(folder: Path, data_dir: Path) -> dict[str, Any]:
    """What the first process of a cycle runs; a single one too."""
    data_dir.mkdir()
    short = CYCLE.ppo.model_copy(update={"iterations": 2})
    settings = replace(CYCLE, ppo=short, cycle=CYCLE.cycle.model_copy(update={"seeds": 1}))
    job = make_job(folder)
    start.lead(job, settings, data_dir)
    result = run_cycle(job, settings, data_dir)
    return {"steps": json.loads((result.folder / "ppo.json").read_text())["steps"], "gain": result.evaluation["reward_gain_base"]}


def launch(out: Path, what: str) -> list[subprocess.Popen[bytes]]:
    """Two processes as torchrun starts them, without its agent, which takes seconds."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    paths = os.pathsep.join(path for path in sys.path if path)
    running = []
    for rank in range(2):
        environment = {**os.environ, "PYTHONPATH": paths, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (out / f"log-{rank}").open("w") as log:
            running.append(subprocess.Popen([sys.executable, __file__, what, str(out)], env=environment, stdout=log, stderr=log))
    return running


def ended(out: Path, running: list[subprocess.Popen[bytes]]) -> None:
    for rank, process in enumerate(running):
        assert process.wait(300) == 0, (out / f"log-{rank}").read_text()[-3000:]


@pytest.mark.slow
def test_a_cycle_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    make_job(tmp_path / "world")
    running = launch(tmp_path, "cycle")
    alone = cycle(tmp_path / "world", tmp_path / "one")
    ended(tmp_path, running)
    together = json.loads((tmp_path / "told.json").read_text())
    assert len(alone["steps"]) == 3  # PPO was not left out
    for ours, theirs in zip(together["steps"], alone["steps"], strict=True):
        for name in FIGURES:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4)
    assert together["gain"] == pytest.approx(alone["gain"], abs=1e-4)
    # Only the first one leaves anything.
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["adapters", "cycles"]


@pytest.mark.slow
def test_two_processes_come_to_what_one_comes_to(tmp_path: Path) -> None:
    folder = learning_policy(tmp_path / "policy")
    running = launch(tmp_path, "train")
    program(folder, tmp_path / "one", False)
    alone = told(tmp_path / "one", 0)
    assert len(alone["steps"]) == SETTINGS.iterations + 1
    ended(tmp_path, running)
    for how in ("whole", "shard"):
        first, second = told(tmp_path / how, 0), told(tmp_path / how, 1)
        assert first["replies"] == second["replies"] == alone["replies"]
        for ours, theirs in zip(figures(first["steps"]), figures(alone["steps"]), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
        assert max(step["first_ratio_deviation"] for step in first["steps"]) <= 1e-6
        assert figures(first["steps"]) == figures(second["steps"])
        adapters = [(tmp_path / how / f"adapter-{rank}" / "adapter_model.safetensors").read_bytes() for rank in range(2)]
        assert adapters[0] == adapters[1]
    # Of the frozen layers each holds half; the policy's adapter and the critic's are whole.
    adapter = 2 * sum(value.numel() for value in Policy.load(folder).state().values())
    assert first["held"] + second["held"] - 2 * adapter == alone["held"] - adapter


def main(what: str, out: Path) -> None:
    torch.set_num_threads(1)
    if what == "cycle" and os.environ["RANK"] == "1":
        return start.follow()
    distributed.start()
    if what == "cycle":
        (out / "told.json").write_text(json.dumps(cycle(out / "world", out / "two")))
        return start.dismiss()
    program(out / "policy", out / "whole", False)
    program(out / "policy", out / "shard", True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
