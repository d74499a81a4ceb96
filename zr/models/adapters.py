"""What peft does to a model: rows of an output layer that it wraps, adapters saved beside the model, or merged into it.

peft itself is imported only where a model has an adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import cached_file

__all__ = ["base_state", "merge_adapters", "restore_precision", "rows_of_output", "save_model"]

PRECISIONS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
WEIGHTS = "adapter_model.safetensors"


def rows_of_output(layer: nn.Module, ids: Sequence[int], features: Tensor) -> Tensor:
    """Some outputs of an output layer, in float32, adapters included.

    Args:
        layer: ``(..., H) -> (..., V)``: a linear layer, or what peft makes of one (LoRA, also several active ones, merged or
            disabled; ``modules_to_save``).
        ids: which of the V outputs; n of them.
        features: ``(..., H)``, of any precision.

    Returns:
        ``(..., n)`` float32.

    Raises:
        ValueError: a layer whose rows cannot be read: quantised, offloaded, or of another kind of adapter.
    """
    found = _wrapper(layer)
    if found == "saved":
        wrapped: Any = layer
        active = [] if wrapped.disable_adapters else wrapped.active_adapters
        return rows_of_output(wrapped.modules_to_save[active[0]] if active else wrapped.original_module, ids, features)
    if found == "lora":
        return _lora_rows(layer, ids, features)
    weight = getattr(layer, "weight", None)
    if (
        not isinstance(layer, nn.Linear)
        or not isinstance(weight, Tensor)
        or weight.dtype not in PRECISIONS
        or weight.dim() != 2
    ):
        raise ValueError(
            f"the rows of an output layer of type {type(layer).__name__} cannot be read: keep the output layer out of the "
            "quantisation (llm_int8_skip_modules=['lm_head']), and of adapters give it plain LoRA or modules_to_save"
        )
    if weight.shape[-1] != features.shape[-1]:
        raise ValueError(f"the output layer packs its weights as {tuple(weight.shape)}: keep it out of the quantisation")
    if weight.is_meta:
        raise ValueError("the output layer is offloaded: give it a place on a device in device_map")
    bias = None if layer.bias is None else layer.bias[ids].float()
    return nn.functional.linear(features.to(weight.device).float(), weight[ids].float(), bias)


def _wrapper(layer: nn.Module) -> str | None:
    """What peft made of a layer that we can read through."""
    if not type(layer).__module__.startswith("peft."):
        return None
    from peft.tuners.lora import Linear
    from peft.utils import ModulesToSaveWrapper

    return "lora" if isinstance(layer, Linear) else "saved" if isinstance(layer, ModulesToSaveWrapper) else None


def _lora_rows(layer: Any, ids: Sequence[int], features: Tensor) -> Tensor:
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its own forward pass does
    logits = rows_of_output(layer.base_layer, ids, features)
    for name in [] if layer.disable_adapters or layer.merged else layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant:
            kind = type(layer.lora_variant[name]).__name__
            raise ValueError(f"adapter {name!r} of the output layer is a {kind}: only plain LoRA can be read row by row")
        down, up = layer.lora_A[name], layer.lora_B[name]
        hidden = nn.functional.linear(layer.lora_dropout[name](features.to(down.weight.device).float()), down.weight.float())
        bias = None if up.bias is None else up.bias[ids].float()
        change = nn.functional.linear(hidden, up.weight[ids].float(), bias)
        logits = logits + layer.scaling[name] * change.to(logits.device)
    return logits


def _adapted(model: Any) -> bool:
    """Whether transformers has added adapters to a model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def save_model(model: Any, folder: str | Path) -> None:
    """Write a model of transformers and its active adapter into one folder, from which transformers loads both.

    transformers by itself writes the adapter alone, and the folder then needs the base model from elsewhere.

    Raises:
        ValueError: adapters that are switched off, or several active ones, of which a folder can hold one.
    """
    if not _adapted(model):
        model.save_pretrained(folder)
        return
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = model.active_adapters()
    if len(names) != 1 or any(m.disable_adapters or m.merged for m in model.modules() if isinstance(m, BaseTunerLayer)):
        raise ValueError(
            f"adapters {list(model.peft_config)}, active {names}: one that is active and not merged can be saved; "
            "choose it by model.set_adapter(name), or merge them (zr.models.adapters.merge_adapters)"
        )
    state = get_peft_model_state_dict(model, adapter_name=names[0], save_embedding_layers=False)
    config = copy.copy(model.peft_config[names[0]])
    if Path(config.base_model_name_or_path or "").exists():
        config.base_model_name_or_path = None  # the folder holds the base model; where it once lay is nobody's business
    _forget_file_names(model)
    model._hf_peft_config_loaded = False  # else only the adapter would be written
    try:
        model.save_pretrained(folder, state_dict=base_state(model))
    finally:
        model._hf_peft_config_loaded = True
    tensors = {f"base_model.model.{name}": tensor.detach().contiguous() for name, tensor in state.items()}
    save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def restore_precision(model: Any, source: str | Path, revision: str | None = None) -> None:
    """Read an adapter of float32 once more, as it was saved: transformers rounds it to the precision of the base model.

    What was trained in float32 so scores the same after loading, and can be trained on.

    Args:
        model: with one adapter, which has just been loaded.
        source: where from: a folder, or a name on the hub.
        revision: branch, tag or commit on the hub.
    """
    (name,) = model.active_adapters()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if model.peft_config[name].peft_type != "LORA" or all(weight.dtype == torch.float32 for weight in weights):
        return
    path = cached_file(str(source), WEIGHTS, revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is None:  # an adapter that is no safetensors file
        return
    with safe_open(path, "pt") as file:
        saved = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (no mapping)
    if saved == {"F32"}:
        for weight in weights:
            weight.data = weight.data.float()
        model.load_adapter(str(source), name, is_trainable=True, hotswap=True, adapter_kwargs={"revision": revision})


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model as it was before adapters were added."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    kept = {}
    inside = [f"{name}." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]
    for name, tensor in model.state_dict().items():
        around = max((start for start in inside if name.startswith(start)), key=len, default=None)
        if around is None:
            kept[name] = tensor
            continue
        part, _, rest = name.removeprefix(around).partition(".")
        if part in {"base_layer", "original_module"}:
            kept[around + rest] = tensor
    return kept


def merge_adapters(model: Any) -> None:
    """Fold the active adapters into the weights and take the wrappers away: the same outputs, at the base model's cost.

    A layer whose weights are tied to another's, as output layers often are, gets weights of its own first.

    Raises:
        ValueError: adapters that are switched off, or of a kind that cannot be merged.
    """
    if not _adapted(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    wrapped = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]
    if any(module.disable_adapters for _, module in wrapped):
        raise ValueError("the adapters are switched off: model.enable_adapters() first, or delete them")
    _untie(model, {name for name, _ in wrapped})
    for name, module in wrapped:
        parent, _, child = name.rpartition(".")
        if isinstance(module, ModulesToSaveWrapper):
            active = module.active_adapters
            plain = module.modules_to_save[active[0]] if active else module.original_module
        else:
            module.merge()
            plain = module.get_base_layer()
        setattr(model.get_submodule(parent), child, plain)
    _forget_file_names(model)
    model._hf_peft_config_loaded = False
    del model.peft_config


def _forget_file_names(model: Any) -> None:
    """Save under the family's own names again: those of an adapter's file, once loaded, have taken their place."""
    vars(model).pop("_weight_conversions", None)


def _untie(model: Any, changed: set[str]) -> None:
    """Give a tied output layer weights of its own where an adapter changes it or the embedding."""
    places = (model.get_input_embeddings(), model.get_output_embeddings())
    source, output = map(_inner, places)
    names = {name for name, module in model.named_modules() if module in places}
    if output.weight is not source.weight or not changed & names:
        return
    output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=output.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _inner(layer: Any) -> Any:
    """The layer itself, without what peft put around it."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else getattr(layer, "original_module", layer)
