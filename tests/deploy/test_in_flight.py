"""Who has which adapter in flight, from what vLLM's metrics say."""

from __future__ import annotations

import pytest

from deploy.engine import _in_flight

NAMES = 'vllm:lora_requests_info{{max_lora="6",running_lora_adapters="{}",waiting_lora_adapters="{}"}} {}\n'
RUNNING = 'vllm:num_requests_running{{engine="0",model_name="base"}} {}\n'
WAITING = 'vllm:num_requests_waiting{{engine="0",model_name="base"}} {}\n'


@pytest.mark.parametrize(
    ("metrics", "names"),
    [
        ("", None),
        (RUNNING.format(1.0), None),  # something runs, and the server does not say what
        (RUNNING.format(0.0) + WAITING.format(0.0), set()),
        # The last line that was written while anything ran stays for ever: it counts only while something runs.
        (RUNNING.format(0.0) + NAMES.format("a-1", "", 10.5), set()),
        (RUNNING.format(1.0) + NAMES.format("a-1", "", 10.5), {"a-1"}),
        (RUNNING.format(0.0) + WAITING.format(1.0) + NAMES.format("", "a-2", 10.5), {"a-2"}),
        (RUNNING.format(2.0) + NAMES.format("a-3", "", 10.5) + NAMES.format("a-1,a-2", "a-4-br1", 11.0), {"a-1", "a-2", "a-4-br1"}),
    ],
)
def test_the_newest_line_counts_while_anything_runs(metrics: str, names: set[str] | None) -> None:
    assert _in_flight(metrics) == names
