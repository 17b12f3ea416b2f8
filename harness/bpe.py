"""
Byte-level BPE of a tokenizer.json as the ranks and the pattern that tiktoken takes.

Such a tokenizer is its tokens in the order in which they were learned: tiktoken merges the pair
whose union comes first among them. `tokenizers` merges by a list of pairs. Where the two would not
give the same tokens for every text, the file is refused.
"""

from harness.errors import InputError

LETTERS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+"     # GPT-2's way to cut a text into words
GPT2 = LETTERS + r"| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"\p{N}|" + LETTERS + r"| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"   # digits one by one


def byte_of_character():
    """{character: byte}, how byte-level BPE writes bytes: those that print as themselves, the
    others as the characters from 256 on (a space as U+0120)."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printed]
    return {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}


def byte_ranks(found, where):
    """{bytes of a token: its id} of the object in tokenizer.json, without the added tokens."""
    model, bytes_of = found.get("model", {}), byte_of_character()
    added = {token["content"] for token in found.get("added_tokens", [])}
    plain = not (model.get("byte_fallback") or model.get("continuing_subword_prefix")
                 or model.get("end_of_word_suffix") or model.get("dropout"))
    written = [token for token in model.get("vocab", ()) if token not in added]
    if model.get("type", "BPE") != "BPE" or not plain or not set().union(*written) <= set(bytes_of):
        raise InputError(f"{where}: not a byte-level BPE, the one kind that is read here")
    ranks = {bytes(bytes_of[c] for c in token): model["vocab"][token] for token in written}
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair)
             for pair in model.get("merges", ())]
    pairs = [tuple(bytes(bytes_of[c] for c in part) for part in pair) for pair in pairs]
    check_merges(ranks, pairs, model.get("ignore_merges", False), where)
    return ranks


def check_merges(ranks, pairs, ignore_merges=False, where="tokenizer.json"):
    """Raise InputError where merging by rank and merging by the list could give other tokens.

    They agree if the list is ordered by the ranks of what it makes, and if it holds the last merge
    by which ranks make each token. Why: in any text, what two neighbours have been merged from
    until then is what it would be had they stood alone, as long as no merge has crossed their
    border. ignore_merges: a word that is a token is taken whole, as tiktoken does in any case.

    Worked example: a 0, b 1, c 2, bc 3, abc 4. Ranks make abc from a and bc. A list with (ab, c) in
    the place of (a, bc) never makes it.
    """
    order = [ranks.get(left + right, -1) for left, right in pairs]
    if order != sorted(order) or -1 in order:
        raise InputError(f"{where}: its merges come in another order than its tokens, which "
                         "tiktoken cannot follow")
    pairs = set(pairs)
    for token in ranks:
        if len(token) == 1:
            continue
        last = last_merge(ranks, token)
        if last not in pairs and not (last is None and ignore_merges):
            raise InputError(f"{where}: ranks and merges disagree about {token!r}, which tiktoken "
                             "would make otherwise")


def last_merge(ranks, token):
    """The two parts from which merging by rank makes a token; None: it never gets there."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        made = [ranks.get(a + b, 2**32) for a, b in zip(parts, parts[1:])]
        first = min(made)
        if first >= 2**32:
            return None
        i = made.index(first)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def word_pattern(found, where):
    """The regular expression that cuts a text into words."""
    steps = found.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds, last, first = [step.get("type") for step in steps], steps[-1], steps[0]
    if last.get("type") == "ByteLevel" and last.get("add_prefix_space") is False:
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and last.get("use_regex", True) \
                and first.get("individual_digits"):
            return DIGITS
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True) \
                and "Regex" in first["pattern"] and not first.get("invert") \
                and first.get("behavior") == "Isolated":
            return first["pattern"]["Regex"]
    raise InputError(f"{where}: pre_tokenizer {' + '.join(map(str, kinds))} is not read here")
