"""Settings that would end in a traceback, or train on nonsense, are refused when they are read."""

from __future__ import annotations

import pytest

from commands.settings import Settings
from feedback.config import load
from feedback.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("REWARD_MODEL__MAPS", "[]", "reward_model.maps.*at least 1"),
        ("REWARD_MODEL__RIDGES", "[1.0]", "reward_model.ridges.*at least 2"),
        ("REWARD_MODEL__RIDGES", "[-1.0, 1.0]", "reward_model.ridges.0.*greater than 0, got -1.0"),
        ("REWARD_MODEL__RIDGES", "[3.0, 1.0]", r"reward_model.ridges is \[3.0, 1.0\], which does not ascend"),
        ("REWARD_MODEL__SEED", "10000000000000000000", "reward_model.seed.*less than or equal to 4294967295"),
        ("CYCLE__SEED", "-1", "cycle.seed.*greater than or equal to 0"),
        ("PPO__LEARNING_RATE", "inf", "ppo.learning_rate.*finite"),
        ("PPO__KL_TARGET_NATS", "inf", "ppo.kl_target_nats.*finite"),
        ("ROLLOUTS__URLS", '["nonsense"]', "rollouts.urls names 'nonsense', which is no address of a server; write http://host:port"),
        ("ROLLOUTS__URLS", '["ftp://gpu7:8000"]', "rollouts.urls names 'ftp"),
        ("ROLLOUTS__URLS", '["http://gpu7:99999"]', "rollouts.urls names 'http://gpu7:99999'"),
        ("ROLLOUTS__URLS", '["http://[::1"]', "rollouts.urls names 'http://.::1'"),
        ("ROLLOUTS__URLS", '["http://gpu7:8000", "http://gpu7:8000/"]', "rollouts.urls names a server twice"),
    ],
)
def test_nonsense_is_refused_by_name_and_limit(monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str) -> None:
    monkeypatch.setenv(f"PLAUDIT__{name}", value)
    with pytest.raises(ConfigError, match=told):
        load(Settings)


def test_a_date_is_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAUDIT__CYCLE__SEED", "20261124")
    assert load(Settings).cycle.seed == 20_261_124
