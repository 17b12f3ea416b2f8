"""
The tokenizer of a published model (tokenizer.json, tokenizer_config.json), and its chat turns.

    base model       plain     the prompt, and before it what the tokenizer puts before a text
    instruct model   chatml    <|im_start|>user\\n7+5=<|im_end|>\\n<|im_start|>assistant\\n
                     llama3    <|start_header_id|>user<|end_header_id|>\\n\\n7+5=<|eot_id|> ...

What is trained is the answer and the token that ends it: <|im_end|>, <|eot_id|>, the end of text.
"""

import functools
import os
import re
import unicodedata

import tiktoken

import data
from harness import bpe, hub
from harness.errors import InputError

PROBE = "a b  c\n\n d\tÀé1½²٣!?. \r\n 漢字\u3000\u0301\u200d🙂'll _x\x00\ue000"
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}    # of a turn, in each template
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"   # from Llama 3.1 on


def tokenizer_of(config):
    """The tokenizer that --tokenizer names: one of ours, or that of a folder."""
    if config.tokenizer not in ("byte", "gpt2") and os.path.isdir(config.tokenizer):
        return published(config.tokenizer, config.template, config.system_prompt)
    if config.template != "auto" or config.system_prompt is not None:
        raise InputError("--template and --system_prompt are for published models: "
                         f"--tokenizer {config.tokenizer} has no turns")
    return data.Tokenizer(config.tokenizer)


def adopt_tokenizer(config, found):
    """A published model brings its tokenizer, and so does what was trained from it, unless
    --tokenizer names another place for it. found: a checkpoint."""
    name = found.get("tokenizer", "byte")
    if name not in ("byte", "gpt2") and config.tokenizer == "byte":
        config.tokenizer = name


def same_tokenizer(config, found):
    """Whether a checkpoint was trained with the tokenizer of the config. Where its folder is gone,
    the one that is named in its place is believed."""
    a, b = config.tokenizer, found.get("tokenizer", config.tokenizer)
    if a == b or not (os.path.isdir(a) and os.path.isdir(b)):
        return a == b or os.path.isdir(a) and b not in ("byte", "gpt2")
    a, b = published(a), published(b)
    return (a.special, a.encoding._mergeable_ranks) == (b.special, b.encoding._mergeable_ranks)


@functools.lru_cache(maxsize=8)
def published(folder, template="auto", system_prompt=None):
    return PublishedTokenizer(folder, template, system_prompt)


# -- the tokenizer --------------------------------------------------------------------------------


def content(token):
    """The text of a token that a config names, alone or as an object; None: it names none."""
    return token["content"] if isinstance(token, dict) else token


class PublishedTokenizer(data.Tokenizer):
    """What data.Tokenizer is, from a folder. A prompt begins as the model's prompts do, and an
    answer ends with the token that ends its turns.

    template: chatml, llama3 or plain; auto: the one whose turns end with the model's own end of
    text, else plain. system_prompt: what is said first; None: what the model's own template says.
    """

    def __init__(self, folder, template="auto", system_prompt=None):
        where = os.path.join(folder, "tokenizer.json")
        found, config = (hub.read_json(folder, name)
                         for name in ("tokenizer.json", "tokenizer_config.json"))
        if not found:
            raise InputError(f"{where}: there is no tokenizer there")
        ranks, added = bpe.byte_ranks(found, where), found.get("added_tokens", [])
        normalizer = (found.get("normalizer") or {}).get("type")
        if normalizer not in (None, "NFC"):
            raise InputError(f"{where}: normalizer {normalizer} is not read here")
        self.special, self.composed = {t["content"]: t["id"] for t in added}, normalizer == "NFC"
        # Some tokens that were added are part of texts, as <think>; the others never are.
        self.in_texts = {t["content"] for t in added if not t["special"]}
        self.names = {t["id"]: t["content"] for t in added if t["special"]}
        self.size = 1 + max([*ranks.values(), *self.special.values()])
        self.vocab_size = hub.read_json(folder, "config.json").get("vocab_size") or self.size
        if self.size > self.vocab_size:
            raise InputError(f"{where}: {self.size} tokens, of which config.json knows "
                             f"{self.vocab_size}")
        missing = {bytes([b]): self.size + b for b in range(256) if bytes([b]) not in ranks}
        self.encoding = tiktoken.Encoding(folder, pat_str=bpe.word_pattern(found, where),
                                          mergeable_ranks=ranks | missing,
                                          special_tokens=self.special)
        self.unknown = self.special.get(found["model"].get("unk_token"))   # for missing bytes
        self.known = {i for i in ranks.values()} | {self.special[t] for t in self.in_texts}
        if self.encoding.decode(self.encoding.encode_ordinary(PROBE)) != PROBE:
            raise InputError(f"{where}: its pattern leaves out a part of some texts")
        self.chat = chat_template(folder, config)
        self.eos_id = self.special.get(content(config.get("eos_token")))
        if self.eos_id is None:
            self.eos_id = end_of_config(folder, where)
        self.choose_template(template, where)
        self.pad_id = self.special.get(content(config.get("pad_token")), self.eos_id)
        self.begin = self.begin_of_text(found)
        self.system_prompt = self.default_system() if system_prompt is None else system_prompt

    def choose_template(self, template, where):
        ends = {name: self.special[end] for name, end in ENDS.items() if end in self.special}
        if template == "auto":
            template = next((name for name, end in ends.items() if end == self.eos_id), "plain")
        if template != "plain" and template not in ends:
            raise InputError(f"--template {template}: {where} has no {ENDS[template]}")
        self.template, self.eos_id = template, ends.get(template, self.eos_id)

    def begin_of_text(self, found):
        """The tokens that come before every text; in turns only if the model's template says so."""
        steps = found.get("post_processor") or {}
        before = []
        for step in steps.get("processors", [steps]):
            for piece in step.get("single", ()) if step.get("type") == "TemplateProcessing" else ():
                if "SpecialToken" not in piece:
                    break
                before.append(self.special[piece["SpecialToken"]["id"]])
        in_turns = self.template != "plain" and self.chat
        return [] if in_turns and "bos_token" not in self.chat else before

    def default_system(self):
        """What the model's own template says where no system prompt is given."""
        found = re.search(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}<|]*)<\|im_end\|>", self.chat)
        return found[1] if found and self.template == "chatml" else ""

    def described(self):
        """One line on what prompts become."""
        if self.template == "plain":
            return "prompts are plain text" + (
                ", though the model has a chat template (--template)" if self.chat else "")
        system = f", after the system prompt {self.system_prompt!r}" if self.system_prompt else ""
        return f"prompts are {self.template} turns{system}"

    # -- texts and ids ----------------------------------------------------------------------------

    def encode(self, text):
        """Token ids of the text alone; a special token written in it is ordinary characters."""
        text = unicodedata.normalize("NFC", text) if self.composed else text
        ids = self.encoding.encode(text, allowed_special=self.in_texts, disallowed_special=())
        ids = [i if i < self.size else self.unknown for i in ids]
        return [i for i in ids if i is not None]

    def decode(self, ids):
        ids = list(ids)
        ids = ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids
        return self.encoding.decode([i for i in ids if i in self.known], errors="replace")

    def encode_prompt(self, prompt):
        """Ids of a prompt as the model expects it, up to where its answer begins. A prompt of
        several turns has them as `turns`, pairs of role and text."""
        if self.template == "plain" or not prompt:
            return self.begin + self.encode(prompt) or [self.eos_id]
        turns = list(getattr(prompt, "turns", [("user", prompt)]))
        system = turns.pop(0)[1] if turns[0][0] == "system" else self.system_prompt
        if self.template == "llama3":
            turns, system = [(role, text.strip()) for role, text in turns], system.strip()
            system = DATES + system if "Cutting Knowledge Date" in self.chat else system
        turns = [("system", system)] * bool(system) + turns
        return self.begin + [i for role, text in turns for i in self.turn(role, text)] \
            + self.turn("assistant")

    def turn(self, role, text=None):
        """Ids of one turn; text None: its opening alone.

            chatml   <|im_start|>user\\n7+5=<|im_end|>\\n
            llama3   <|start_header_id|>user<|end_header_id|>\\n\\n7+5=<|eot_id|>
        """
        special = self.special
        if self.template == "llama3":
            opening = [special["<|start_header_id|>"], *self.encode(role),
                       special["<|end_header_id|>"]]
            return opening + self.encode("\n\n") if text is None else \
                [*opening, *self.encode(f"\n\n{text}"), self.eos_id]
        if text is None:   # Qwen3: an answer without a thought begins with an empty one
            thought = "<think>\n\n</think>\n\n" if "enable_thinking" in self.chat else ""
            return [special["<|im_start|>"], *self.encode(f"{role}\n{thought}")]
        return [special["<|im_start|>"], *self.encode(f"{role}\n{text}"), self.eos_id,
                *self.encode("\n")]


def chat_template(folder, config):
    """The source of the model's own template, which is looked at but never run; "" if none."""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            return file.read()
    found = config.get("chat_template") or ""
    if isinstance(found, list):   # several by name
        found = next((one["template"] for one in found if one["name"] == "default"), "")
    return found


def end_of_config(folder, where):
    """The id of the end of text where the tokenizer's config does not name it."""
    for name in ("generation_config.json", "config.json"):
        found = hub.read_json(folder, name).get("eos_token_id")
        if found is not None:
            return found[0] if isinstance(found, list) else found
    raise InputError(f"{where}: no file beside it says which token ends a text (eos_token)")
