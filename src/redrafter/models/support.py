"""What can be run exactly, decided from config.json alone, before any weights load.

The target must be a decoder-only transformer whose layers all attend to every earlier token, at rotary positions,
through transformers' attention interface. Everything else is refused by name.
"""

from __future__ import annotations

import re
from typing import Any

from redrafter.errors import CorruptModel, InvalidRequest, UnsupportedModel
from redrafter.params import MAX_DRAFT_LENGTH

FULL_ATTENTION = {"full_attention", "attention"}
SLIDING_ATTENTION = "sliding_attention"
# A configuration key with a true value -> the feature it turns on. Matched against the whole key.
REFUSED_KEYS = (
    (r"kv_lora_rank", "multi-latent attention"),
    (r"index_topk.*|index_n_heads", "attention to indexed blocks only"),
    (r".*mamba.*|ssm_.*|state_size|d_state|xlstm.*", "state-space layers"),
    (r"linear_(conv|key|value|attn|num|head).*", "linear attention"),
    (r"conv_l_cache|conv1d_width|conv_kernel|conv_kernel_size", "convolution layers"),
    (r"attention_chunk_size|keep_window_size|attention_window_size", "attention to chunks or a dynamic window"),
    (r"n_recurrent_layers|num_recurrent_layers", "recurrent layers"),
    (r"alibi", "ALiBi positions"),
    (r"use_bidirectional_attention", "bidirectional attention"),
    (r"add_cross_attention", "cross-attention"),
    (r"num_kv_shared_layers", "layers that share keys and values"),
    (r".*attention_sink.*", "attention sinks"),
)
# Architectures whose configuration does not tell.
REFUSED_TYPES = {
    "bloom": "ALiBi positions",
    "mpt": "ALiBi positions",
    "falcon": "attention outside transformers' attention interface",
    "gpt_neox_japanese": "attention outside transformers' attention interface",
    "rwkv": "a recurrent state instead of attention",
    "recurrent_gemma": "recurrent layers",
    "hrm_text": "recurrent layers",
    "gpt_oss": "attention sinks",
    "mimo_v2_flash": "attention sinks",
    "flint": "attention sinks",
    "granite_swa": "attention sinks",
    "granitemoe_swa": "attention sinks",
    "zaya": "state-space layers",
    "doge": "attention to a dynamic window",
}


def check_supported(config: dict[str, Any], max_context: int | None) -> int:
    """The context limit in tokens: the least of max_position_embeddings, the sliding window and ``max_context``.

    Every token of a context no longer than the window is inside it, so such a context is exact. Raises
    UnsupportedModel for what cannot be run exactly, InvalidRequest for a ``max_context`` the model never had,
    CorruptModel for a configuration that transformers cannot read.
    """
    if max_context is not None and (isinstance(max_context, bool) or not isinstance(max_context, int)):
        raise InvalidRequest(f"max_context={max_context!r} is not allowed: it must be a whole number of tokens")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CorruptModel("config.json names no model_type, so no architecture: copy or download the model again")
    _check_origin(config, model_type)
    parsed = _parse(config, model_type)
    _check_features(parsed, model_type)
    return _context_limit(parsed, model_type, max_context)


def _check_origin(config: dict[str, Any], model_type: str) -> None:
    """Refuse by the keys of the file itself: encoder-decoders, composites, remote code, quantised weights."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.get("is_encoder_decoder"):
        raise UnsupportedModel(f"{model_type} is an encoder-decoder: only decoder-only models can be accelerated")
    parts = sorted(key for key in config if re.fullmatch(r"(text|vision|audio|speech)_config", key))
    if parts:
        raise UnsupportedModel(f"{model_type} joins several models ({', '.join(parts)}): use a text-only checkpoint")
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unnamed") if isinstance(quantised, dict) else quantised
        raise UnsupportedModel(
            f"quantization_config {method!r} needs kernels of its own: use the unquantised weights or a GGUF file"
        )
    if model_type not in CONFIG_MAPPING or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        remote = "; code that comes with a model (auto_map) is never run" if config.get("auto_map") else ""
        raise UnsupportedModel(f"model_type {model_type!r} is no causal language model of this transformers{remote}")


def _parse(config: dict[str, Any], model_type: str) -> Any:
    """transformers' own configuration object, which fills in the defaults that a file may leave out."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(config))
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CorruptModel(
            f"config.json is not a valid {model_type} configuration ({reason}); copy it again"
        ) from error


def _check_features(parsed: Any, model_type: str) -> None:
    if model_type in REFUSED_TYPES:
        raise _refused(model_type, REFUSED_TYPES[model_type])
    if getattr(parsed, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{model_type} is an encoder-decoder: only decoder-only models can be accelerated")
    values = parsed.to_dict()
    for key, value in values.items():
        for pattern, feature in REFUSED_KEYS:
            if value and re.fullmatch(pattern, key.lower()):
                raise _refused(model_type, f"{feature} ({key}={value!r})")
    for kind in values.get("layer_types") or ():
        if kind not in FULL_ATTENTION and kind != SLIDING_ATTENTION:
            raise _refused(model_type, f"{kind} layers (layer_types)")
    if getattr(parsed, "sub_configs", None):
        raise UnsupportedModel(f"{model_type} joins several models: use a text-only checkpoint")
    if not values.get("rope_parameters") and not values.get("rope_theta"):
        raise _refused(model_type, "positions that are not rotary (no rope_parameters)")


def _refused(model_type: str, feature: str) -> UnsupportedModel:
    return UnsupportedModel(f"{model_type} uses {feature}, which cannot be run exactly here: choose another model")


def _context_limit(parsed: Any, model_type: str, max_context: int | None) -> int:
    trained = getattr(parsed, "max_position_embeddings", None)
    if not isinstance(trained, int) or trained < 1:
        raise CorruptModel(f"config.json gives max_position_embeddings={trained!r}; it must be a number of tokens")
    if max_context is not None and not 1 <= max_context <= trained:
        raise InvalidRequest(
            f"max_context={max_context} is not allowed: it must be 1 to {trained}, the model's context"
        )
    limit = trained
    for name, exact in (("sliding window", _window(parsed, model_type)), ("rotary scaling", _rotary_limit(parsed))):
        if exact is None or exact >= limit:
            continue
        if max_context is not None and max_context > exact:
            raise UnsupportedModel(
                f"max_context={max_context} exceeds {exact}, the longest context that is exact with {model_type}'s "
                f"{name}: ask for {exact} or less"
            )
        limit = exact
    return limit if max_context is None else min(limit, max_context)


def _window(parsed: Any, model_type: str) -> int | None:
    """Tokens that the narrowest layer sees, itself included; None if every layer sees all."""
    kinds = getattr(parsed, "layer_types", None)
    window = getattr(parsed, "sliding_window", None)
    if kinds and SLIDING_ATTENTION not in kinds:
        return None
    if kinds and not window:
        raise _refused(model_type, "sliding_attention layers without a sliding_window")
    if not isinstance(window, int) or window < 1:
        return None
    return window


def _rotary_limit(parsed: Any) -> int | None:
    """Tokens within which the rotary frequencies are constant; None if they always are.

    ``dynamic`` and ``longrope`` change the frequencies of a whole forward by its largest position, and a drafted tree
    reaches up to MAX_DRAFT_LENGTH past the text, so the limit stays that far below the change.
    """
    parameters = getattr(parsed, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    limits = []
    for rope in nested or [parameters]:
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            limits.append(rope.get("original_max_position_embeddings") or parsed.max_position_embeddings)
        elif "dynamic" in kind:
            limits.append(parsed.max_position_embeddings)
    return max(1, min(limits) - MAX_DRAFT_LENGTH) if limits else None
