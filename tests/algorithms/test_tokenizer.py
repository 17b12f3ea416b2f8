"""The two tokenizers: bytes, and tiktoken's gpt2."""

import pytest
import tiktoken

from data import Tokenizer
from harness.errors import InputError

TOKENIZER = Tokenizer("byte")
EOS, PAD = 256, 257


@pytest.mark.parametrize("text", ["", "7+5=2", "naïve Ω 漢字", "👩‍👩‍👧 🙂",
                                  "a\nb\r\n\tc\0", "<end>", "x<end><pad>y", "\ufeff\u2028"])
def test_bytes_round_trip_any_text(text):
    """A token a byte, all below 256: whatever a text says, `<end>` included, it never makes a
    special token."""
    ids = TOKENIZER.encode(text)
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_decoding_stops_at_the_first_end():
    """What stands after <end> is not read, padding is left out, and broken UTF-8 becomes U+FFFD."""
    assert TOKENIZER.decode([55, EOS, 56, EOS]) == "7"
    assert TOKENIZER.decode([PAD, 55, PAD, 56]) == "78"
    assert TOKENIZER.decode([EOS]) == TOKENIZER.decode([]) == ""
    assert TOKENIZER.decode([55, 0xF0, 0x9F, EOS]) == "7\ufffd"


def test_the_byte_tokenizer_says_how_large_it_is():
    """256 bytes and two special tokens."""
    assert (TOKENIZER.eos_id, TOKENIZER.pad_id, TOKENIZER.vocab_size) == (256, 257, 258)


def test_gpt2_that_cannot_be_downloaded_is_an_input_error(monkeypatch):
    """Offline, --tokenizer gpt2 says what to do instead of failing inside a library."""
    def offline(name):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(InputError, match="gpt2.*could not be downloaded.*--tokenizer byte"):
        Tokenizer("gpt2")


def test_gpt2_ids_are_tiktokens(monkeypatch):
    """gpt2 keeps tiktoken's own <end>; padding is a token beside its 50,257, and the table has room
    for it."""
    class Fake:
        eot_token, n_vocab = 50256, 50257

        def decode(self, ids, errors):
            return " ".join(map(str, ids))
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: Fake())
    tokenizer = Tokenizer("gpt2")
    assert tokenizer.eos_id == 50256 < tokenizer.pad_id < tokenizer.vocab_size
    # without what tiktoken does not know
    assert tokenizer.decode([1, tokenizer.pad_id, 50300, 2, 50256, 3]) == "1 2"


def test_unknown_tokenizer():
    """Any other name is an InputError that lists the right ones."""
    with pytest.raises(InputError, match="gpt3 is unknown: use byte or gpt2"):
        Tokenizer("gpt3")
