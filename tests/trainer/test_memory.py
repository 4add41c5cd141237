"""The plan's arithmetic: by hand, against real models' sizes, and against what training really keeps."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from feedback.errors import InvalidInput
from trainer import losses, memory
from trainer.config import PPOSettings
from trainer.memory import Shape, Where, plan
from trainer.policy import Policy
from trainer.reply import Reply

ROOT = Path(__file__).resolve().parents[2]
CONCIERGE = ROOT / "examples" / "concierge" / "policy"
TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "vocab_size": 10,
    "tie_word_embeddings": True,
}


def test_a_plan_by_hand() -> None:
    shape = Shape.of(TINY)
    # Heads of 4: q and o 8x8, k and v 8x4, gate, up and down 8x16, two norms of 8: 128 + 64 + 384 + 16.
    assert shape.layer == 592
    assert shape.whole == 10 * 8 + 8
    # Rank 2: q, o 2·(8+8) each, k, v 2·(8+4) each, three of 2·(8+16): 64 + 48 + 144 = 256 a layer.
    assert shape.adapter(2) == 512
    # float32: 4·(4·8 + 4·8 + 4·16 + 7·2) = 568. bfloat16: norms 64, attention 64, gate 96, inputs 4·(40 + 8 + 16) = 256, ranks 56.
    assert shape.saved(2, 4) == 568
    assert shape.saved(2, 2) == 536
    ppo = PPOSettings(rank=2, rollouts=4, microbatch_tokens=10)
    found = {row.what.split(":")[0].split(",")[0]: row.size_bytes for row in plan(TINY, ppo, Where(max_model_len=6, number=4))}
    assert found == {
        "backbone": (2 * 592 + 88) * 4,
        "adapter": 512 * 24,
        # 10 tokens x (3 x 568 + 12 x 8), and 256 rows x 10 words x 8.
        "training": 10 * (3 * 568 + 96) + 20480,
        # The merged layers, 4 rows x 6 tokens x 2 x 2 layers x 4 x 4 bytes, 4 rows x 10 words x 16 bytes.
        "sampling": 1184 * 4 + 1536 + 640,
        "figures of the replies": 5 * 4 * 6 * 4 + 4 * 8 * 4,
        # 5088 + 12288 + max(38480, 6912) + 608.
        "peak": 56464,
    }
    # A critic's adapter: weights, gradient and Adam's two of another 512 numbers. RLOO has no critic.
    assert plan(TINY, ppo.model_copy(update={"critic": "adapter"}), Where(max_model_len=6, number=4))[1].size_bytes == 512 * 24 + 512 * 16
    rloo = ppo.model_copy(update={"critic": "adapter", "algorithm": "rloo"})
    assert plan(TINY, rloo, Where(max_model_len=6, number=4))[1].size_bytes == 512 * 24
    # Two processes share the layers (592, and two gathered ones), nobody merges; replies come from elsewhere.
    sharded = plan(TINY, ppo, Where(max_model_len=6, number=2, processes=2, sharded=True, local=False))
    assert sharded[0].size_bytes == (592 + 2 * 592 + 88) * 2
    assert sharded[3].size_bytes == 0


def test_parameters_are_those_of_real_models() -> None:
    def parameters(config: dict[str, object]) -> int:
        shape = Shape.of(config)
        return shape.layers * shape.layer + shape.whole

    policy = Policy.load(CONCIERGE)
    shape = Shape.of(json.loads((CONCIERGE / "config.json").read_text()))
    own = sum(p.numel() for name, p in policy.model.named_parameters() if "lora_" not in name)
    assert shape.layers * shape.layer + shape.whole == own
    assert shape.adapter(8) == sum(p.numel() for p in policy.parameters)
    # As their cards say it.
    assert parameters(BASES["SmolLM2 135M"]) == 134_515_008
    assert parameters(BASES["Llama 3.1 8B"]) == 8_030_261_248
    assert parameters(BASES["Llama 3.2 1B"]) == 1_235_814_400


def test_what_is_no_llama_is_said_so() -> None:
    with pytest.raises(InvalidInput, match="'intermediate_size'"):
        Shape.of({name: value for name, value in TINY.items() if name != "intermediate_size"})


@pytest.mark.parametrize(("dtype", "number"), [("float32", 4), ("bfloat16", 2)])
def test_what_a_token_keeps_for_the_backward_pass(dtype: str, number: int) -> None:
    policy = Policy.load(CONCIERGE, dtype=dtype)  # type: ignore[arg-type]
    shape = Shape.of(json.loads((CONCIERGE / "config.json").read_text()))
    replies = [Reply(tuple(range(5 + i, 45 + i)), tuple(range(50, 90)), False) for i in range(8)]
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states_BTD, _, _ = policy.hidden(replies)
    assert states_BTD.requires_grad
    tokens = 8 * 80
    # Layers keep what was worked out, within a tenth.
    assert sum(kept.values()) / tokens == pytest.approx(shape.layers * shape.saved(8, number), rel=0.1)


def test_the_plan_knows_how_many_rows_and_replies_go_at_once() -> None:
    assert memory.LOGITS_ROWS == losses.LOGITS_ROWS
    assert inspect.signature(Policy.sample).parameters["batch_size"].default == memory.SAMPLE_BATCH


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
BASES: dict[str, dict[str, object]] = {
    name: {**dict(zip(SIZES, sizes, strict=True)), "head_dim": head, "vocab_size": words, "tie_word_embeddings": tied}
    for name, sizes, head, words, tied in (
        ("SmolLM2 135M", (576, 30, 9, 3, 1536), 64, 49_152, True),
        ("Qwen 2.5 0.5B", (896, 24, 14, 2, 4864), 64, 151_936, True),
        ("Llama 3.2 1B", (2048, 16, 32, 8, 8192), 64, 128_256, True),
        ("Qwen 2.5 3B", (2048, 36, 16, 2, 11_008), 128, 151_936, True),
        ("Llama 3.1 8B", (4096, 32, 32, 8, 14_336), 128, 128_256, False),
    )
}


def row_of(name: str) -> str:
    """A base's line in the table of docs/training.md."""
    ppo = PPOSettings(rank=16, rollouts=256, microbatch_tokens=2048)
    places = [Where(1024, local=False), *(Where(1024, 2, n, True, False) for n in (2, 8))]
    columns = [plan(BASES[name], ppo, place) for place in places]
    cells = [*(row.size_bytes for row in columns[0][:3]), *(rows[-1].size_bytes for rows in columns)]
    return f"| {name} | " + " | ".join(f"{cell / 2**30:.1f}" for cell in cells) + " |"


@pytest.mark.parametrize("name", BASES)
def test_the_documented_table_is_the_plans(name: str) -> None:
    assert row_of(name) in (ROOT / "docs" / "training.md").read_text()


MEASURE = """
import json, sys
from pathlib import Path
import peft, torch, transformers
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM
from trainer.policy import Policy
from trainer.ppo import train
from trainer.config import PPOSettings

torch.set_num_threads(1)
before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
policy = Policy.load(Path(sys.argv[1]))
prompts = [tuple(range(5 + i, 15 + i)) for i in range(8)]
settings = PPOSettings(**json.loads(sys.argv[2]))
train(policy, prompts, lambda replies, features: torch.zeros(len(replies)), settings, max_tokens=40, temperature=1.0)
# Not getrusage's figure, which begins with what the process had that started this one.
highest = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(highest.split()[1]) * 1024 - before)
"""


@pytest.mark.slow
def test_the_plan_against_what_a_step_really_takes() -> None:
    asked = {"iterations": 1, "rollouts": 64, "minibatch": 64, "epochs": 1, "microbatch_tokens": 3200}
    command = [sys.executable, "-c", MEASURE, str(CONCIERGE), json.dumps(asked)]
    # Otherwise the C library keeps what was freed in pieces that fit nothing else, and twice as much is resident.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=300, env=environment)
    measured = int(ended.stdout.split()[-1])
    config = json.loads((CONCIERGE / "config.json").read_text())
    planned = plan(config, PPOSettings.model_validate(asked), Where(50, number=4))[-1].size_bytes
    assert measured / 1.5 < planned < measured * 1.5
