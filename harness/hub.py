"""
Published checkpoints: a folder with config.json, model.safetensors and tokenizer.json.

The Llama, Qwen2, Qwen3 (dense) and Mistral families are the block of model.py, whose parameters
carry their names; so reading one is a matter of renaming:

    theirs                                     ours
    model.layers.0.self_attn.q_proj.weight     layers.0.self_attn.q_proj.weight
    lm_head.weight                             lm_head.weight; left out where embeddings are tied
    hidden_size, num_hidden_layers, ...        n_embd, n_layer, ...

What a config says is either computed as it says, or refused by its name. A key that is not known
here is refused as well: it may mean something.
"""

import json
import os

import torch

from harness.errors import InputError
from model import GPT, GPTConfig, rotary_angles

# {name of theirs: ours}; what model.py takes over as a number
NUMBERS = {"vocab_size": "vocab_size", "max_position_embeddings": "block_size",
           "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
           "num_key_value_heads": "n_kv_head", "hidden_size": "n_embd",
           "intermediate_size": "n_hidden", "rms_norm_eps": "norm_eps"}
# {model_type: (bias on q, k and v; norm on q and k)}
FAMILIES = {"llama": (False, False), "mistral": (False, False), "qwen2": (True, False),
            "qwen3": (False, True)}
# What means something that model.py computes in one way alone: the values that say so.
FIXED = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
         "use_sliding_window": (False,), "attention_dropout": (0, None), "use_mrope": (False,),
         "rope_interleaved": (False,), "quantization_config": (None,),
         "partial_rotary_factor": (1, None)}
# What does not change the logits: token ids (the tokenizer has them), types, names, training.
SILENT = {"model_type", "architectures", "bos_token_id", "eos_token_id", "pad_token_id",
          "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache",
          "initializer_range", "pretraining_tp", "max_window_layers", "sliding_window",
          "layer_types", "tie_word_embeddings", "head_dim", "rope_theta", "rope_scaling",
          "rope_parameters", "is_llama_config", "transformers.js_config"} | set(NUMBERS)
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_json(folder, name):
    """The object in a .json file of a folder; {} where there is no such file."""
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: a JSON object is needed")
    return found


def is_published(folder):
    """Whether a folder holds somebody's published model, and not a run of ours."""
    return os.path.isdir(folder) and not os.path.exists(os.path.join(folder, "ckpt.pt")) \
        and "model_type" in read_json(folder, "config.json")


# -- the config -----------------------------------------------------------------------------------


def model_config(config, where="config.json"):
    """Their config (a dict) -> ours, as keyword arguments of GPTConfig. Raises InputError, naming
    what is meant, where model.py would compute something else.

    Worked example: {"model_type": "qwen2", "num_attention_heads": 14, "hidden_size": 896, ...} ->
    {"n_head": 14, "n_embd": 896, "head_dim": 64, "qkv_bias": True, "qk_norm": False, ...}
    """
    def refuse(name, value):
        raise InputError(f"{where}: {name} {value} is not what model.py computes")
    family, length = config.get("model_type"), config.get("max_position_embeddings", 0)
    if family not in FAMILIES:
        raise InputError(f"{where}: model_type {family} is not among those that model.py computes: "
                         f"{', '.join(FAMILIES)}")
    if any(not name.endswith("ForCausalLM") for name in config.get("architectures") or []):
        refuse("architectures", config["architectures"])
    for name, allowed in FIXED.items():
        if config.get(name, allowed[0]) not in allowed:
            refuse(name, config[name])
    unknown = sorted(set(config) - SILENT - set(FIXED))
    if unknown:
        raise InputError(f"{where}: {unknown[0]} is not known here; take it out if it does not "
                         "change what the model computes")
    if set(config.get("layer_types") or []) - {"full_attention"}:
        refuse("layer_types", sorted(set(config["layer_types"])))
    # A Qwen has its window only with use_sliding_window; one as long as the context is none.
    if not family.startswith("qwen") and (config.get("sliding_window") or length) < length:
        refuse("sliding_window", config["sliding_window"])
    if config.get("num_key_value_heads") is None:   # before there were groups
        config = {**config, "num_key_value_heads": config.get("num_attention_heads")}
    missing = [name for name in NUMBERS if config.get(name) is None]
    if missing:
        raise InputError(f"{where}: {missing[0]} is missing")
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}),
                                             "rope_theta": config.get("rope_theta", 10000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        refuse("rope_scaling", rope)
    bias, norm = FAMILIES[family]
    head_dim = config.get("head_dim") or (128 if family == "qwen3" else
                                          config["hidden_size"] // config["num_attention_heads"])
    return {**{ours: config[name] for name, ours in NUMBERS.items()}, "head_dim": head_dim,
            "qkv_bias": bias, "qk_norm": norm, "rope_theta": float(rope["rope_theta"]),
            "rope_scaling": {name: rope[name] for name in LLAMA3} if kind == "llama3" else None,
            "tie_embeddings": config.get("tie_word_embeddings", False)}


# -- the weights ----------------------------------------------------------------------------------


def safetensors():
    """The library that reads and writes weights, which is installed apart."""
    try:
        import safetensors.torch
    except ImportError:
        raise InputError("published weights need the safetensors library: pip install "
                         "safetensors") from None
    return safetensors


def read_tensors(folder):
    """(name, tensor) of every tensor in model.safetensors, or in the files that its index names,
    one at a time."""
    index = read_json(folder, "model.safetensors.index.json").get("weight_map")
    for name in sorted(set(index.values())) if index else ["model.safetensors"]:
        path, library = os.path.join(folder, name), safetensors()
        if not os.path.exists(path):
            raise InputError(f"{path}: there are no weights there")
        try:
            with library.safe_open(path, framework="pt") as file:
                for key in file.keys():
                    yield key, file.get_tensor(key)
        except library.SafetensorError as error:
            raise InputError(f"{path}: not a safetensors file, or a truncated one ({error})") \
                from None


def build(config, tensors, device="cpu"):
    """A model of float32 with the weights of tensors(), pairs of their name and a tensor. One is
    held at a time, so memory takes no more than the model. device "meta": its shape alone. Raises
    InputError where the weights are not the model's."""
    with torch.device("meta"):   # shapes without numbers
        model = GPT(GPTConfig(**config))
    if device == "meta":
        return model
    wanted = set(model.state_dict())
    for name, tensor in tensors():
        ours = name.removeprefix("model.")
        if name.endswith("rotary_emb.inv_freq") or ours == "lm_head.weight" and \
                model.config.tie_embeddings:   # transformers does not read them either
            continue
        if ours not in wanted:
            raise InputError(f"the weights hold {name}, which the model of config.json has not")
        shape = tuple(model.get_parameter(ours).shape)
        if not tensor.is_floating_point() or tuple(tensor.shape) != shape:
            raise InputError(f"the weights hold {name} as {tensor.dtype} {tuple(tensor.shape)}; "
                             f"config.json says {shape}")
        tensor = tensor.to(device, torch.float32, copy=True)
        model.load_state_dict({ours: tensor}, strict=False, assign=True)
        wanted.remove(ours)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
        wanted.discard("lm_head.weight")
    if wanted:
        raise InputError(f"the weights lack {min(wanted)}")
    model.cos, model.sin = (x.to(device) for x in rotary_angles(model.config))
    return model


def read(folder):
    """A published folder in the form of a checkpoint of ours (harness/checkpoint.py), the weights
    still to be read."""
    where = os.path.join(folder, "config.json")
    return {"model": lambda: read_tensors(folder), "tokenizer": os.path.abspath(folder),
            "model_config": model_config(read_json(folder, "config.json"), where)}
