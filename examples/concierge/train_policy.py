"""Makes `policy/`: trains the concierge from scratch, about two minutes on two cores.

    python -m examples.concierge.train_policy [OUT_DIR]

Facts first, then manners: 390 facts stick only after some 80 repetitions each, which are cheap while an answer is one sentence.
Whole dialogues then teach the style that answers vary in, in a quarter of the words that they would need from the start.

Also writes `base_answers.jsonl`, answers of the policy at temperature 1, from which `world.py` learns what base answers show.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.concierge import corpus, town

SEED = 7
FACT_BATCHES, FACT_BATCH = 450, 64
"""Questions with the one sentence that answers them."""
DIALOGUE_BATCHES, DIALOGUE_BATCH = 800, 8
"""Dialogues as guests have them; small batches, because a step of this model costs little more than its words."""
SORTED_BATCHES = 40
"""Batches whose dialogues are sorted by length, so that little is padding."""
LEARNING_RATE = 3e-3
MAX_TOKENS = 48
SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Words with the space before them, and marks. Joining tokens gives the text back; an unknown word becomes <unk>."""
    splitter = pre_tokenizers.Split(Regex(r" ?[^\s.,!?]+|[.,!?]"), behavior="removed", invert=True)
    words = sorted({piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<|assistant|>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def encode(tokenizer: PreTrainedTokenizerFast, dialogues: list[corpus.Dialogue]) -> list[list[int]]:
    """Token ids of whole dialogues."""
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in dialogues]
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]


def batches_of(sequences: list[list[int]], size: int) -> list[list[list[int]]]:
    """Batches in the order of the sequences."""
    return [sequences[start : start + size] for start in range(0, len(sequences), size)]


def by_length(rng: np.random.Generator, sequences: list[list[int]], size: int) -> list[list[list[int]]]:
    """Batches of similar length, in random order."""
    batches: list[list[list[int]]] = []
    for some in batches_of(sequences, size * SORTED_BATCHES):
        similar = batches_of(sorted(some, key=len), size)
        batches += [similar[int(i)] for i in rng.permutation(len(similar))]
    return batches


def train(model: Any, batches: list[list[list[int]]], pad: int) -> None:
    """AdamW with warm-up and cosine; every token is predicted."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    started = time.perf_counter()
    for step, rows in enumerate(batches):
        warm, progress = min(1.0, (step + 1) / 50), step / len(batches)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * warm * 0.5 * (1 + math.cos(math.pi * progress))
        width = max(map(len, rows))
        ids_BT = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        # The loss is shifted inside; attention needs no mask because padding is on the right of causal attention.
        loss = model(input_ids=ids_BT, labels=ids_BT.masked_fill(ids_BT == pad, -100)).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == len(batches) - 1:
            print(f"step {step} loss {loss.item():.3f} {time.perf_counter() - started:.0f} s", flush=True)


@torch.no_grad()
def sample(model: Any, tokenizer: PreTrainedTokenizerFast, prompts: list[str], per_prompt: int) -> list[dict[str, object]]:
    """Answers at temperature 1 as rows of prompt, answer, finished."""
    rows: list[dict[str, object]] = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        ids_BT = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids] * per_prompt)
        out_BT = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), do_sample=True, temperature=1.0, top_k=0, max_new_tokens=MAX_TOKENS
        )
        for ids in out_BT[:, ids_BT.shape[1] :].tolist():
            answer = tokenizer.decode(ids, skip_special_tokens=True)
            rows.append({"prompt": prompt, "answer": answer, "finished": tokenizer.eos_token_id in ids})
    return rows


def main(out: Path) -> None:
    """Corpus, tokenizer, training, files."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    facts = [corpus.fact(rng) for _ in range(FACT_BATCHES * FACT_BATCH)]
    dialogues = [corpus.dialogue(rng) for _ in range(DIALOGUE_BATCHES * DIALOGUE_BATCH)]
    texts = [message["content"] for messages in dialogues for message in messages]
    tokenizer = make_tokenizer([*texts, *town.questions(), *(item.answer for item in town.facts())])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    model: Any = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokenizer)} tokens", flush=True)
    # Facts are not sorted by length: those of one length are about few things, and such batches teach worse.
    plain = batches_of(encode(tokenizer, facts), FACT_BATCH)
    train(model, plain + by_length(rng, encode(tokenizer, dialogues), DIALOGUE_BATCH), config.pad_token_id)
    model.eval().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    asked = [str(text) for text in np.random.default_rng(SEED + 1).permutation(sorted(town.questions()))[:128]]
    rows = sample(model.float(), tokenizer, asked, 8)
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    (out / "base_answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "policy")
