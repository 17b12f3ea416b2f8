"""
Tiny random checkpoints in the form in which models are published, written here: config.json,
model.safetensors and tokenizer.json of each family, and what stands for the safetensors library
where it is not installed.
"""

import contextlib
import json
import pickle
import random
import re
from collections import Counter
from types import SimpleNamespace

import torch

from harness import bpe

# -- tokenizers -----------------------------------------------------------------------------------

TEXT = """The quick brown fox jumps over the lazy dog, and then it's the dog's turn: 1234 times 5
is 6170. def f(x):\n    return x * 2  # twice\n\nWhat are the answers?  They'll tell us; we're sure.
Über naïve cafés 漢字 and 🙂 the the there then them these those \
answer answered\t\tanswers\r\n"""
AWKWARD = ["", " ", "  \n\n  x", "don't DON'T we'Ll '\u017f", "12345 678,90 ²½Ⅷ٣",
           "a\r\n\r\nb\t\tc   ", "naïve e\u0301 Å \u1e9b\u0323",
           "漢字かな交じり文 한국어", "\U0001f469\u200d\U0001f467 🙂🙂",
           "\u3000\u2028x\ufeff", "x\x00y\x7f", "\n", " \n a",
           "the answers   answered 2*3=6\n\n#### 6", "<|im_end|> <|eot_id|><s>", "_a__b-c...!?",
           "<think>\nhm\n</think>\n\nthe end", "é\u0301\u0301"]
SPLIT = {"qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
                 r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
         "llama": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?"
                  r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}
SYSTEM = "Be brief & clear."
CHATML = ("{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
          "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
          "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN25 = CHATML.replace("\n", "\\n")    # as Qwen2.5 writes the end of a line
QWEN3 = ("{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
         "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}"
         "{%- endif %}{{- m.content + '<|im_end|>\\n' }}"
         "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
         "{%- if enable_thinking is defined and enable_thinking is false %}"
         "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}")
TURN = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim"
LLAMA3 = ("{{- bos_token }}{%- for m in messages %}{{- " + TURN + " + '<|eot_id|>' }}{%- endfor %}"
          "{%- if add_generation_prompt %}"
          "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}")
LLAMA31 = ("{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024'"
           " %}{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system_message = "
           "messages[0]['content'] | trim %}{%- set messages = messages[1:] %}{%- else %}"
           "{%- set system_message = '' %}{%- endif %}"
           "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
           "{{- 'Cutting Knowledge Date: December 2023\\n' }}"
           "{{- 'Today Date: ' + date_string + '\\n\\n' }}{{- system_message }}{{- '<|eot_id|>' }}"
           + LLAMA3.removeprefix("{{- bos_token }}"))
LLAMA_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                "<|eot_id|>")
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# {kind: (pattern, special tokens, end of text, template, further settings)}
TOKENIZERS = {
    "qwen2.5": ("qwen", QWEN_TOKENS, "<|im_end|>", QWEN25, dict(nfc=True)),
    "qwen2.5-base": ("qwen", QWEN_TOKENS, "<|endoftext|>", QWEN25, dict(nfc=True)),
    "qwen3": ("qwen", QWEN_TOKENS, "<|im_end|>", QWEN3, dict(nfc=True, thinks=True)),
    "llama3": ("llama", LLAMA_TOKENS, "<|eot_id|>", LLAMA3, dict(bos=True, every_split=True)),
    "llama3.1": ("llama", LLAMA_TOKENS, "<|eot_id|>", LLAMA31, dict(bos=True, every_split=True)),
    "llama3-base": ("llama", LLAMA_TOKENS, "<|end_of_text|>", None, dict(bos=True)),
    "smollm2": ("digits", QWEN_TOKENS, "<|im_end|>", CHATML, dict(special_first=True)),
    "gpt2": ("gpt2", ("<|endoftext|>",), "<|endoftext|>", None, {}),
}


def learn_merges(count):
    """The merges of a byte-level BPE, learned from TEXT: pairs of bytes objects, each a new one."""
    words = Counter(tuple(bytes([b]) for b in word.encode())
                    for word in re.findall(r" ?[^\W\d]+|\d+|\s+|[^\w\s]+", TEXT))
    merges, made = [], set()
    while len(merges) < count:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n if b"".join(pair) not in made else 0
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        made.add(b"".join(best))
        words = Counter({merged(word, best): n for word, n in words.items()})
    return merges


def merged(word, pair):
    out, i = [], 0
    while i < len(word):
        both = word[i:i + 2] == pair
        out.append(b"".join(pair) if both else word[i])
        i += 1 + both
    return tuple(out)


def tokenizer_json(kind, count=80):
    """The object in a tokenizer.json."""
    pattern, tokens, _, _, more = TOKENIZERS[kind]
    written = {byte: c for c, byte in bpe.byte_of_character().items()}
    merges = learn_merges(count)
    used = [b for b in range(256) if not (more.get("special_first") and (b > 244 or b < 9))]
    learned = [bytes([b]) for b in used] + [a + b for a, b in merges]
    ids, first = {}, len(tokens) if more.get("special_first") else 0
    for i, token in enumerate(learned):
        ids["".join(written[b] for b in token)] = first + i
    pairs = [["".join(written[b] for b in part) for part in pair] for pair in merges]
    if more.get("every_split"):   # as the converter from tiktoken writes them
        pairs = [[token[:i], token[i:]] for token in ids for i in range(1, len(token))
                 if token[:i] in ids and token[i:] in ids]
    thoughts = ("<think>", "</think>") if more.get("thinks") else ()
    added = {t: (i if more.get("special_first") else len(ids) + i) for i, t in
             enumerate(tokens + thoughts)}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False,
                      use_regex=pattern in ("gpt2", "digits"))
    steps = {"gpt2": [], "digits": [dict(type="Digits", individual_digits=True)]}.get(
        pattern, [dict(type="Split", pattern={"Regex": SPLIT.get(pattern)}, behavior="Isolated",
                       invert=False)])
    post = dict(byte_level)
    if more.get("bos"):
        begin = {"SpecialToken": {"id": tokens[0], "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        post = dict(type="TemplateProcessing", single=[begin, a], pair=[begin, a, begin, b],
                    special_tokens={tokens[0]: dict(id=tokens[0], ids=[added[tokens[0]]],
                                                    tokens=[tokens[0]])})
    return dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[dict(id=i, content=t, special=t not in thoughts, **flags)
                      for t, i in added.items()],
        normalizer=dict(type="NFC") if more.get("nfc") else None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[*steps, byte_level]) if steps
        else byte_level, post_processor=post, decoder=byte_level,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="",
                   end_of_word_suffix="", fuse_unk=False, byte_fallback=False,
                   ignore_merges=bool(more.get("every_split")),
                   vocab={**(added if more.get("special_first") else {}), **ids}, merges=pairs))


def write_json(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def write_tokenizer(folder, kind):
    """tokenizer.json and tokenizer_config.json. -> how many tokens there are"""
    _, tokens, end, template, more = TOKENIZERS[kind]
    found = tokenizer_json(kind)
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=end, pad_token=tokens[0],
                  bos_token=tokens[0] if more.get("bos") else None,
                  clean_up_tokenization_spaces=False)
    if template:
        config["chat_template"] = template
    write_json(folder, "tokenizer.json", found)
    write_json(folder, "tokenizer_config.json", config)
    return 1 + max([*found["model"]["vocab"].values(), *(t["id"] for t in found["added_tokens"])])


# -- models ---------------------------------------------------------------------------------------

SHAPE = dict(vocab_size=352, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
             rms_norm_eps=1e-5, hidden_act="silu", rope_theta=10000.0, tie_word_embeddings=False,
             torch_dtype="float32")
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64)
# {family: (config.json, tokenizer)}
FAMILIES = {
    "qwen2": (dict(SHAPE, model_type="qwen2", architectures=["Qwen2ForCausalLM"],
                   tie_word_embeddings=True, use_sliding_window=False, sliding_window=128,
                   max_window_layers=1, rope_theta=1e6), "qwen2.5"),
    "qwen2-untied": (dict(SHAPE, model_type="qwen2"), "qwen2.5-base"),
    "qwen3": (dict(SHAPE, model_type="qwen3", head_dim=16, tie_word_embeddings=True,
                   attention_bias=False), "qwen3"),
    "llama3": (dict(SHAPE, model_type="llama", attention_bias=False, mlp_bias=False,
                    rope_theta=5e5), "llama3"),
    "llama3.2": (dict(SHAPE, model_type="llama", head_dim=8, rope_scaling=LLAMA3_ROPE,
                      rope_theta=5e5, tie_word_embeddings=True), "llama3.1"),
    "smollm2": (dict(SHAPE, model_type="llama", rope_interleaved=False, is_llama_config=True,
                     tie_word_embeddings=True), "smollm2"),
    "mistral": (dict(SHAPE, model_type="mistral", sliding_window=None, head_dim=16), "gpt2"),
}


def tensors_of(config, seed=0):
    """{name: random tensor} as the family publishes them, norms and biases random as well."""
    generator = torch.Generator().manual_seed(seed)
    C, V, H = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    hd = config.get("head_dim", C // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    shapes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, C)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, C)
            if config["model_type"] == "qwen2":
                shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        if config["model_type"] == "qwen3":
            shapes |= {f"{at}self_attn.{name}_norm.weight": (hd,) for name in "qk"}
        shapes |= {f"{at}self_attn.o_proj.weight": (C, q), f"{at}input_layernorm.weight": (C,),
                   f"{at}post_attention_layernorm.weight": (C,),
                   f"{at}mlp.gate_proj.weight": (H, C), f"{at}mlp.up_proj.weight": (H, C),
                   f"{at}mlp.down_proj.weight": (C, H)}
    return {name: ("norm" in name) + 0.3 * torch.randn(shape, generator=generator)
            for name, shape in shapes.items()}


def write_model(folder, family, save_file, shards=1, **changes):
    """A checkpoint of a family, in one file or in several with their index. -> the folder"""
    config, kind = FAMILIES[family]
    tensors = tensors_of({**config, **changes})
    write_json(folder, "config.json", {**config, **changes})
    write_tokenizer(folder, kind)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names, index = list(tensors), {}
    random.Random(0).shuffle(names)
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        index |= {name: file for name in names[i::shards]}
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file,
                  {"format": "pt"})
    write_json(folder, "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    return folder


# -- where the library is not installed -----------------------------------------------------------


class FakeFile:
    def __init__(self, tensors):
        self.keys, self.get_tensor = tensors.keys, tensors.get


@contextlib.contextmanager
def fake_open(path, framework):
    try:
        yield FakeFile(load_file(path))
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise FAKE.SafetensorError(str(error)) from None


def load_file(path):
    with open(path, "rb") as file:
        return torch.load(file)


def fake_save(tensors, path, metadata):
    torch.save(tensors, path)


FAKE = SimpleNamespace(safe_open=fake_open, torch=SimpleNamespace(save_file=fake_save),
                       SafetensorError=type("SafetensorError", (Exception,), {}))
