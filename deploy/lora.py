"""What an adapter may say and hold so that it fits the one base model: PEFT's fields by allow-list, tensors by name and shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from deploy.manifest import CONFIG, LINEAR, WEIGHTS, linear_shapes
from deploy.tensors import TensorEntry, refuse

SCALE = 64.0
"""Most that a change may be multiplied by: alpha / r. Trained ones have 1 to 4."""
PREFIX = "base_model.model.model.layers."

Rule = tuple[Callable[[object], bool], str]
"""(whether a value passes, what passes in words)"""


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(*allowed: object) -> Rule:
    # By type too: 1 equals True, and says something else to a reader.
    words = " or ".join(repr(each) for each in allowed)
    return lambda value: any(type(value) is type(each) and value == each for each in allowed), words


def _text(value: object) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= 500)


NOTHING = _one_of(None)
OFF = _one_of(False, None)
EMPTY: Rule = (lambda value: value is None or value in ({}, []), "empty")
BOOL = _one_of(True, False)

FIELDS: Mapping[str, Rule] = {
    "peft_type": _one_of("LORA"),
    "task_type": _one_of("CAUSAL_LM"),
    "r": (lambda value: type(value) is int and value > 0, "a whole number above 0"),
    "lora_alpha": (lambda value: _number(value) and value > 0, "a finite number above 0"),  # type: ignore[operator]
    "target_modules": (
        lambda value: isinstance(value, list) and bool(value) and all(each in LINEAR for each in value) and len(set(value)) == len(value),
        f"a list of {', '.join(LINEAR)}",
    ),
    "lora_dropout": (lambda value: _number(value) and 0 <= value < 1, "in [0, 1)"),  # type: ignore[operator]
    "inference_mode": BOOL,
    "bias": _one_of("none"),
    "init_lora_weights": _one_of(True, False, "gaussian"),
    "base_model_name_or_path": (_text, "a name or null"),
    "revision": (_text, "a name or null"),
    "peft_version": (_text, "a version"),
    "fan_in_fan_out": OFF,
    "use_rslora": OFF,
    "use_dora": OFF,
    "use_qalora": OFF,
    "use_bdlora": OFF,
    "lora_bias": OFF,
    "ensure_weight_tying": OFF,
    "modules_to_save": EMPTY,
    "rank_pattern": EMPTY,
    "alpha_pattern": EMPTY,
    "loftq_config": EMPTY,
    "layer_replication": EMPTY,
    "exclude_modules": EMPTY,
    "auto_mapping": NOTHING,
    # Read only by what is off above.
    "qalora_group_size": (_number, "a number"),
    "megatron_core": _one_of("megatron.core", None),
}
"""Every field that may have a value. One that is not here may only be null: it could mean anything to the next reader."""


def check_config(peft: Mapping[str, object], max_rank: int, what: str) -> None:
    """Raises InvalidInput at the first field whose value changes what the weights alone say, or is out of range."""
    for name, value in peft.items():
        allowed, words = FIELDS.get(name, (None, ""))
        if allowed is None and value is not None:
            why = "which brings code" if name == "auto_map" else "which is not among the fields that are understood"
            refuse(f"{what}: {CONFIG} says {name[:60]!r} = {str(value)[:60]!r}, {why}; leave it out", field=name)
        if allowed is not None and not allowed(value):
            refuse(f"{what}: {CONFIG} says {name!r} = {str(value)[:80]!r}, only {words} is loaded", field=name)
    for name in ("peft_type", "r", "lora_alpha", "target_modules"):
        if name not in peft:
            refuse(f"{what}: {CONFIG} does not say {name!r}", field=name)
    rank, alpha = int(str(peft["r"])), float(str(peft["lora_alpha"]))
    if rank > max_rank:
        refuse(f"{what}: {CONFIG} says r = {rank}, engine.max_lora_rank is {max_rank}", field="r")
    if alpha / rank > SCALE:
        refuse(f"{what}: {CONFIG} says lora_alpha = {alpha:g} with r = {rank}, a scale of {alpha / rank:g}; at most {SCALE:g} is loaded")


def expected_shapes(base: Mapping[str, object], peft: Mapping[str, object]) -> dict[str, tuple[int, int]]:
    """Every tensor that such an adapter of this base model has: A is rank x in, B is out x rank."""
    layers, shapes = linear_shapes(base)
    rank, modules = int(str(peft["r"])), peft["target_modules"]
    assert isinstance(modules, list), "check_config first"
    found = {}
    for layer in range(layers):
        for module in modules:
            wide_in, wide_out = shapes[module]
            key = f"{PREFIX}{layer}.{LINEAR[module]}.{module}"
            found[f"{key}.lora_A.weight"] = (rank, wide_in)
            found[f"{key}.lora_B.weight"] = (wide_out, rank)
    return found


def largest_file(base: Mapping[str, object], max_rank: int) -> int:
    """Bytes of the weights of the largest adapter that fits, without its header."""
    layers, shapes = linear_shapes(base)
    return sum(4 * layers * max_rank * (wide_in + wide_out) for wide_in, wide_out in shapes.values())


def check_tensors(found: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, int]], what: str) -> None:
    """Raises InvalidInput at a tensor too many, one too few or one of another shape."""
    if foreign := sorted(found.keys() - expected.keys()):
        refuse(
            f"{what}: {WEIGHTS} holds {foreign[0][:80]!r} and {len(foreign) - 1} more that {CONFIG} and the base model do not have; "
            "only LoRA pairs of target_modules are loaded"
        )
    if lacking := sorted(expected.keys() - found.keys()):
        refuse(f"{what}: {WEIGHTS} lacks {lacking[0]!r} and {len(lacking) - 1} more, {len(expected)} tensors were expected")
    for name, shape in expected.items():
        if found[name].shape != shape:
            refuse(f"{what}: {WEIGHTS}: tensor {name!r} has shape {list(found[name].shape)}, the base model has {list(shape)}")
