"""What the trainer attests of a candidate that every gate lets pass."""

from __future__ import annotations

from typing import Any

GOOD: dict[str, Any] = {
    "reward_gain_base": {"mean": 0.8, "low": 0.5, "high": 1.1, "n": 24},
    "reward_gain_stable": {"mean": 0.4, "low": 0.1, "high": 0.7, "n": 24},
    "likelihood_gain": {"mean": 0.05, "low": 0.02, "high": 0.08, "n": 420},
    "kl_nats": 2.5,
    "kl_budget_nats": 2.0,
    "facts": {"n": 3000, "base": 0.8, "candidate": 0.795, "diff": -0.005, "low": -0.012, "margin_points": 2.0, "certifies_points": 1.0},
    "length": {"base": 20.0, "candidate": 24.0},
    "finished": {"base": 0.9, "candidate": 0.85},
    "repetition": {"base": 0.01, "candidate": 0.02},
    "refusal": {"base": 0.0, "candidate": 0.0},
    "on_topic": {"base": 0.9, "candidate": 0.88},
    "language": {"base": 0.0, "candidate": 0.02},
    "kl_nats_at_1": 2.6,
    "chat_facts": {"n": 300, "base": 0.7, "candidate": 0.7, "diff": 0.0, "low": -0.03},
    "sycophancy": {"n": 200, "rise_nats": 0.1, "high": 0.3, "echo": {"base": 0.3, "candidate": 0.32}},
    "copied": {"strings": 0, "known": 40},
    "probes": [{"prompt": "Hello", "base": "Hi.", "candidate": "Hi!", "stable": "Hi."}],
    "shuffled": False,
}
