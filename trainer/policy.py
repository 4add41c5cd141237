"""The policy: a frozen backbone with a LoRA adapter. The reference is the same backbone with the adapter off.

A critic or a reward model may have adapters of their own on that backbone; only the policy's is saved and served.

Teacher-forced sequences are padded on the right, so that with causal attention padding can change nothing before it and
needs no mask. What all prompts of a batch begin with (the system prompt) is computed once. Adapters, log-probabilities and states
are float32 whatever the backbone is; what a reward model reads (features) is returned on the CPU, the rest on the policy's device.
Where several processes train, all of them make the same calls: `sample`, `passes` and `features` share the work and return the whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from feedback.errors import InvalidInput, TrainingRefused
from trainer import distributed
from trainer.config import Device, Dtype
from trainer.generation import generate
from trainer.losses import chosen_logprobs
from trainer.reply import Reply, by_tokens, pad, shared_prefix

POLICY = "default"
"""Peft's name of the adapter that is the policy."""
GROUP_TOKENS = 1024
"""Tokens that go through the model at once where no gradients are wanted."""


class Policy:
    """Samples replies and says how likely they are. Not thread-safe: the adapter is switched on and off."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.base = model.get_base_model()
        self.trunk = self.base.base_model
        self.head = self.base.get_output_embeddings()
        self._adapter_off = False
        self.device: torch.device = self.head.weight.device
        self.dtype: torch.dtype = self.head.weight.dtype
        self.sharded = False
        """Whether each process holds only its part of the backbone: then all take every forward pass together."""
        self.hidden_size = int(self.base.config.hidden_size)
        self.feature_size = 2 * self.hidden_size
        ends = getattr(self.base.generation_config, "eos_token_id", None)
        ends = tokenizer.eos_token_id if ends is None else ends
        self.eos_ids = tuple(ends) if isinstance(ends, list) else (int(ends),)
        self.pad_id = self.eos_ids[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        rank: int = 8,
        alpha: int = 16,
        seed: int = 0,
        adapter: Path | None = None,
        device: Device = "auto",
        dtype: Dtype = "auto",
        shard: bool = False,
    ) -> Policy:
        """A policy folder, with a fresh adapter (B = 0, so it is the reference) or a saved one.

        `auto` is the GPU and bfloat16 where there is one, else the CPU and float32. With `shard` each of several processes keeps
        its part of the backbone only. Raises InvalidInput where the folder is no model, the adapter is none for it, or the device
        is not there.
        """
        from peft import PeftModel, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        where, kind = place(device, dtype)
        logging.disable_progress_bar()
        try:
            base = AutoModelForCausalLM.from_pretrained(path, dtype=kind, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as exc:
            reason = str(exc).splitlines()[0]
            raise InvalidInput(f"policy.base is {str(path)!r}, which cannot be loaded as a model: {reason}", field="policy.base") from exc
        sharded = shard and distributed.size() > 1
        if not sharded:
            base.to(where)
        _check_head(base, path)
        if adapter is not None:
            try:
                model = PeftModel.from_pretrained(base, adapter, is_trainable=True, torch_device=str(base.device))
            except (OSError, ValueError, RuntimeError) as exc:
                reason = str(exc).splitlines()[0]
                raise InvalidInput(f"adapter {str(adapter)!r} does not fit {path.name!r}: {reason}", field="adapter") from exc
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = get_peft_model(base, _lora(rank, alpha))
        model.eval()
        if sharded:
            distributed.shard(base, where, [p for name, p in model.named_parameters() if "lora_" in name])
        policy = cls(model, tokenizer)
        policy.sharded = sharded
        return policy

    def add_adapter(self, name: str, *, rank: int, alpha: int, seed: int) -> None:
        """Another adapter on the same backbone (B = 0), used inside `using`."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model.add_adapter(name, _lora(rank, alpha))
        self._use(POLICY)

    def drop_adapter(self, name: str) -> None:
        """Forget one of the further adapters, if it is there."""
        if name in self.model.peft_config:
            self.model.delete_adapter(name)
            self._use(POLICY)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Inside, this adapter is on instead of the policy's. Gradients flow back outside, too."""
        self._use(name)
        try:
            yield
        finally:
            self._use(POLICY)

    def _use(self, name: str) -> None:
        self.model.base_model.set_adapter(name)
        # Peft lets only the adapter that is on have gradients; a loss may reach several.
        for parameter_name, parameter in self.model.named_parameters():
            if "lora_" in parameter_name:
                parameter.requires_grad_(True)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The policy adapter's; the backbone's get no gradient."""
        return self.parameters_of(POLICY)

    def parameters_of(self, name: str) -> list[torch.nn.Parameter]:
        """Those of one adapter."""
        return [parameter for _, parameter in self._named(name)]

    def state(self, name: str = POLICY) -> dict[str, Tensor]:
        """A copy of an adapter's weights."""
        return {parameter_name: p.detach().clone() for parameter_name, p in self._named(name)}

    def _named(self, name: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((full, p) for full, p in self.model.named_parameters() if "lora_" in full and f".{name}." in full)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

    def save(self, folder: Path) -> None:
        """PEFT files that a model server loads as they are. The same weights give the same bytes, on any machine."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        weights = get_peft_model_state_dict(self.model, adapter_name=POLICY)
        save_file({name: weights[name].detach().contiguous() for name in sorted(weights)}, folder / "adapter_model.safetensors")
        config = copy.deepcopy(self.model.peft_config[POLICY])
        # A set has no order and the base's folder is this machine's: neither belongs in a file that is hashed.
        config.target_modules = sorted(config.target_modules)
        config.base_model_name_or_path = None
        config.inference_mode = True
        config.save_pretrained(folder)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the adapter is off. Peft's own context manager costs 10-30 ms an entry, these two calls do not."""
        self.model.base_model.disable_adapter_layers()
        self._adapter_off = True
        try:
            yield
        finally:
            self._adapter_off = False
            self.model.base_model.enable_adapter_layers()

    @contextmanager
    def _merged(self) -> Iterator[None]:
        """Inside, the backbone's weights are W + (alpha / r)·BA and the adapter is off.

        A step of one token would otherwise spend as long on the adapter's many small products as on the weights. The very
        tensors W come back afterwards, because subtracting would leave rounding in the reference. A bfloat16 sum would lose
        most of a small adapter, and a sharded W is not all here: there the adapter stays beside the weights.
        """
        if self._adapter_off or self.sharded or self.dtype != torch.float32:
            yield
            return
        kept = [(layer, layer.weight.data) for layer in self.model.modules() if hasattr(layer, "get_delta_weight")]
        with torch.no_grad():
            for layer, weight in kept:
                layer.weight.data = weight + layer.get_delta_weight(POLICY)
        try:
            with self.reference():
                yield
        finally:
            for layer, weight in kept:
                layer.weight.data = weight

    def encode(self, messages: Sequence[dict[str, Any]], system_prompt: str | None = None) -> tuple[int, ...]:
        """Token ids of a conversation up to where the answer begins."""
        turns = list(messages)
        if system_prompt is not None and not any(turn["role"] == "system" for turn in turns):
            turns = [{"role": "system", "content": system_prompt}, *turns]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def reply(self, messages: Sequence[dict[str, Any]], system_prompt: str | None, answer: str, finished: bool) -> Reply:
        """An answer that was served, tokenised again."""
        tokens = tuple(self.tokenizer(answer, add_special_tokens=False).input_ids)
        end = self.eos_ids[:1] if finished or not tokens else ()
        return Reply(self.encode(messages, system_prompt), (*tokens, *end), finished)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[tuple[int, ...]], *, max_tokens: int, temperature: float, seed: int, batch_size: int = 64
    ) -> list[Reply]:
        """One reply for each prompt from pi at this temperature, with nothing cut off (no top-p, no top-k); 0 is greedy.

        A reply hangs on the seed, its place among the prompts and its prompt, not on who else is in its batch.
        """
        generator = torch.Generator().manual_seed(seed)
        uniforms_BT = torch.rand(len(prompts), max_tokens, generator=generator, dtype=torch.float64)
        turns = distributed.turns(range(len(prompts)))
        replies: list[Reply] = []
        for start in range(0, len(turns), batch_size):
            some = [row for row, _ in turns[start : start + batch_size]]
            with self._merged():
                replies += generate(self, [prompts[i] for i in some], temperature, uniforms_BT[some])
        return distributed.gather([reply for reply, (_, counts) in zip(replies, turns, strict=True) if counts])

    def hidden(self, replies: Sequence[Reply]) -> tuple[Tensor, Tensor, Tensor]:
        """One forward pass: (states_BTD that predict each reply token, mask_BT, features_BF of each reply).

        Features are what a reward model reads: the state after the last token, then the mean of the states after all of them. A habit
        at the beginning of a long reply may have left the last state.
        """
        if any(not reply.tokens for reply in replies):
            raise TrainingRefused("a reply has 0 tokens, at least 1 is needed", field="replies")
        shared = 0 if self.sharded else shared_prefix([reply.prompt for reply in replies])
        ids_BS = pad([(*reply.prompt[shared:], *reply.tokens) for reply in replies], self.pad_id)[0].to(self.device)
        if shared:
            from transformers import DynamicCache

            cache = DynamicCache(config=self.base.config)
            prefix_1P = torch.tensor([replies[0].prompt[:shared]], device=self.device)
            self.trunk(input_ids=prefix_1P, past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(replies))
            states_BSD = self.trunk(input_ids=ids_BS, past_key_values=cache, use_cache=True).last_hidden_state
        else:
            states_BSD = self.trunk(input_ids=ids_BS, use_cache=False).last_hidden_state
        lengths_B = torch.tensor([len(reply.tokens) for reply in replies], device=self.device)
        first_B = torch.tensor([len(reply.prompt) - 1 - shared for reply in replies], device=self.device)
        steps_T = torch.arange(max(len(reply.tokens) for reply in replies), device=self.device)
        mask_BT = (steps_T[None] < lengths_B[:, None]).float()
        index_BT = (first_B[:, None] + steps_T[None]).clamp(max=ids_BS.shape[1] - 1)
        rows_B = torch.arange(len(replies), device=self.device)
        states_BTD, last_BD = states_BSD[rows_B[:, None], index_BT].float(), states_BSD[rows_B, first_B + lengths_B].float()
        # What predicts a token stands after the one before it.
        after_BD = (states_BTD * mask_BT[:, :, None]).sum(1) - states_BTD[:, 0] + last_BD
        return states_BTD, mask_BT, torch.cat([last_BD, after_BD / lengths_B[:, None]], 1)

    def token_logprobs(self, states_BTD: Tensor, mask_BT: Tensor, replies: Sequence[Reply], temperature: float) -> Tensor:
        """Log-probability of each reply token under softmax(logits / temperature), B x T, 0 on padding."""
        targets_BT = pad([reply.tokens for reply in replies], self.pad_id)[0].to(self.device)
        real_BT = mask_BT.bool()
        chosen_N = chosen_logprobs(states_BTD[real_BT].to(self.dtype), self.head.weight, targets_BT[real_BT], temperature)
        return torch.zeros_like(mask_BT).masked_scatter(real_BT, chosen_N)

    @torch.no_grad()
    def passes(
        self,
        replies: Sequence[Reply],
        temperature: float,
        groups: Sequence[Sequence[int]] | None = None,
        value: Callable[[Sequence[Reply], Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(logprobs_BT, mask_BT, values_BT, features_BF) of many replies, without gradients, one group at a time.

        `groups` are indices that go through the model together; default: `GROUP_TOKENS` of similar length. `value` reads a group's
        replies and states; without it values are 0. States are not kept: they would be B x T x D numbers.
        """
        size = 3, len(replies), max(len(reply.tokens) for reply in replies)
        logprobs_BT, mask_BT, values_BT = torch.zeros(size, device=self.device)
        features_BF = torch.zeros(len(replies), self.feature_size, device=self.device)
        for group, counts in distributed.turns(by_tokens(replies, GROUP_TOKENS) if groups is None else groups):
            some, rows = [replies[i] for i in group], torch.tensor(group, device=self.device)
            states_GTD, mask_GT, features_GF = self.hidden(some)
            values_GT = mask_GT * 0 if value is None else value(some, states_GTD) * mask_GT
            if not counts:
                continue
            width = mask_GT.shape[1]
            features_BF[rows] = features_GF
            logprobs_BT[rows, :width] = self.token_logprobs(states_GTD, mask_GT, some, temperature)
            mask_BT[rows, :width] = mask_GT
            values_BT[rows, :width] = values_GT
        distributed.total(logprobs_BT, mask_BT, values_BT, features_BF)
        return logprobs_BT, mask_BT, values_BT, features_BF

    def logprobs(self, replies: Sequence[Reply], temperature: float, *, reference: bool = False) -> tuple[Tensor, Tensor]:
        """(logprobs_BT, mask_BT) without gradients, on the CPU."""
        found = self.reference_pass(replies, temperature) if reference else self.passes(replies, temperature)
        return found[0].cpu(), found[1].cpu()

    def reference_pass(
        self, replies: Sequence[Reply], temperature: float, groups: Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One adapter-off forward for both uses: (reference logprobs_BT, mask_BT, reward features_BF)."""
        with self.reference():
            logprobs_BT, mask_BT, _, features_BF = self.passes(replies, temperature, groups)
        return logprobs_BT, mask_BT, features_BF.cpu()

    @torch.no_grad()
    def features(self, replies: Sequence[Reply]) -> Tensor:
        """What `hidden` gives of each reply with the adapter off; B x F."""
        features_BF = torch.zeros(len(replies), self.feature_size, device=self.device)
        with self.reference():
            for group, counts in distributed.turns(by_tokens(replies, GROUP_TOKENS)):
                features_GF = self.hidden([replies[i] for i in group])[2]
                if counts:
                    features_BF[torch.tensor(group, device=self.device)] = features_GF
        distributed.total(features_BF)
        return features_BF.cpu()


def place(device: Device, dtype: Dtype) -> tuple[torch.device, torch.dtype]:
    """What `auto` means on this machine. Raises InvalidInput where a GPU is asked for and none is there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("hardware.device is 'cuda', and torch sees no GPU here; say 'cpu', or 'auto'", field="hardware.device")
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        return where, torch.bfloat16 if where.type == "cuda" else torch.float32
    return where, torch.bfloat16 if dtype == "bfloat16" else torch.float32


def _lora(rank: int, alpha: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


@torch.no_grad()
def _check_head(base: Any, path: Path) -> None:
    """Refuse a model whose logits are not simply its last states times its output embeddings (soft caps, scales, biases)."""
    weight_VD = base.get_output_embeddings().weight
    ids = torch.tensor([[0, 1]], device=weight_VD.device)
    near = 1e-3 if weight_VD.dtype == torch.float32 else 2e-2
    states = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if not states.isfinite().all():
        told = "its states are no finite numbers, so weights are damaged or too large for hardware.dtype; fetch it again or name another"
        raise InvalidInput(f"policy.base is {str(path)!r}: {told}", field="policy.base")
    if not torch.allclose(base(ids, use_cache=False).logits, states @ weight_VD.T, atol=near, rtol=near):
        raise InvalidInput(
            f"policy.base is {str(path)!r}: logits that are more than states x output embeddings are not supported", field="policy.base"
        )
