"""What `plaudit train` and `plaudit trainer` say before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from commands import learning
from commands.settings import Settings
from deploy.config import PolicySettings
from feedback.errors import ConfigError
from trainer.config import HardwareSettings

POLICY = Path(__file__).resolve().parents[2] / "examples" / "concierge" / "policy"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_several_processes_are_refused_where_one_works(rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2: `plaudit trainer` is one process; start `plaudit train` under torchrun"):
        learning.trainer()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("device", "dtype", "gpu", "told"),
    [
        ("auto", "auto", False, "float32 (what this machine's CPU would use;"),
        ("auto", "auto", True, "bfloat16 (what this machine's GPU would use;"),
        ("cuda", "auto", False, "bfloat16 (hardware.device)"),
        ("cpu", "auto", True, "float32 (hardware.device)"),
        ("auto", "bfloat16", False, "bfloat16 (hardware.dtype)"),
        ("auto", "float32", True, "float32 (hardware.dtype)"),
    ],
)
def test_the_plan_is_for_the_machine_that_is_meant(
    device: str, dtype: str, gpu: bool, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    hardware = HardwareSettings.model_validate({"device": device, "dtype": dtype})
    learning._plan(Settings(policy=PolicySettings(base=str(POLICY)), hardware=hardware))
    assert told in " ".join(capsys.readouterr().out.split())
