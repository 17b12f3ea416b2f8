"""
A model of ours as a published one: config.json, model.safetensors and the tokenizer's files, which
transformers loads, and so what is built on it. The inverse of harness/hub.py.
"""

import json
import os
import shutil

import torch

from harness import hub
from harness.errors import InputError

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
          "merges.txt", "generation_config.json", "chat_template.jinja")   # with an export


def published_config(model):
    """The config.json of a model of ours; the inverse of hub.model_config."""
    config = model.config
    family = next((name for name, has in hub.FAMILIES.items()
                   if has == (config.qkv_bias, config.qk_norm)), None)
    if family is None or config.scalar_head:
        what = "a reward model" if config.scalar_head else "qkv_bias with qk_norm"
        raise InputError(f"--export: no published family has {what}")
    rope = {"rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope["rope_scaling"] = {"rope_type": "llama3", **config.rope_scaling}
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    return {"model_type": family, "architectures": [f"{name}ForCausalLM"],
            **{theirs: getattr(config, ours) for theirs, ours in hub.NUMBERS.items()}, **rope,
            "head_dim": config.head_dim, "hidden_act": "silu",
            "tie_word_embeddings": config.tie_embeddings}


def export(model, source, folder, dtype=torch.float32):
    """Write a model as transformers reads it, with the tokenizer's files of the folder `source`
    (None: there are none). Raises InputError for a folder that holds something."""
    if os.path.isdir(folder) and os.listdir(folder):
        raise InputError(f"--export {folder}: the folder is not empty; name a new one")
    config = published_config(model)
    original = hub.read_json(source, "config.json") if source else {}
    if original and hub.model_config(original) == hub.model_config(config):
        config = {name: value for name, value in original.items() if name != "dtype"}
    library = hub.safetensors()
    os.makedirs(folder, exist_ok=True)
    tied = {"lm_head.weight"} if model.config.tie_embeddings else set()
    tensors = {name if name.startswith("lm_head") else f"model.{name}": tensor.to("cpu", dtype)
               for name, tensor in model.state_dict().items() if name not in tied}
    library.torch.save_file(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump({**config, "torch_dtype": str(dtype).removeprefix("torch.")}, file, indent=2)
    for name in COPIED if source else ():
        if os.path.exists(os.path.join(source, name)):
            shutil.copy(os.path.join(source, name), folder)
