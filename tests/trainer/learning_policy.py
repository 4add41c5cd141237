"""A policy of 100,000 parameters, made in a second, and a preference that it can learn: enough to see what learning does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.reply import Reply

WORDS = ["<pad>", "<unk>", "<user>", "<bot>", "<eos>", *(f"w{i}" for i in range(59))]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '' }}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def learning_policy(folder: Path) -> Path:
    """A random Llama over 64 words; head size 32, so that vLLM would take it too."""
    torch.set_num_threads(1)  # two threads spend longer waiting for each other than such a model computes
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=4,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def low_words(replies: Sequence[Reply], features_BD: Tensor | None = None) -> Tensor:
    """A score that likes the first half of the vocabulary; from -4 to 4, so that its sd is about 1."""
    return torch.tensor([8 * sum(t < 32 for t in reply.tokens) / len(reply.tokens) - 4 for reply in replies])
