"""A random Llama of a few thousand parameters with a vocabulary of words, made in a second: for tests of plumbing, not of learning."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (
    *("red", "green", "blue", "one", "two", "three", "where", "when", "shop", "street"),
    *("open", "closed", "yes", "no", "maybe", "please", "thanks", "hello", "tea", "bread"),
)
TEMPLATE = "<bos>{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<say>{% endif %}"


def make_tiny_policy(folder: Path) -> Path:
    """Write a model folder; the same bytes every time."""
    special = ["<pad>", "<unk>", "<bos>", "<eos>", "<say>"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f" {word}" for word in WORDS)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^\s]+"), behavior="removed", invert=True)
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<say>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            # The usual 0.02 would make every word as likely as every other, whatever was said before.
            model.model.embed_tokens.weight.normal_(0, 0.6)
            model.lm_head.weight.normal_(0, 0.25)
    model.generation_config.eos_token_id = 3
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
