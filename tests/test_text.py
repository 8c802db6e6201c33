"""Text as a function of the token ids: the same however they arrive, and the same as decoding them all at once."""

from __future__ import annotations

import itertools
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from redrafter.errors import CorruptModel, InvalidRequest, UnsupportedModel
from redrafter.text import Piece, StopMatcher, Tokenizer
from tests import fakes

BYTE_LEVEL = fakes.byte_level()
FAMILIES = {
    "byte level": BYTE_LEVEL,
    "sentencepiece": fakes.sentencepiece(),
    "sentencepiece, first space kept": fakes.sentencepiece(strip=False),
    "metaspace": fakes.metaspace(),
}
TOKENIZERS = {name: Tokenizer(raw, name) for name, raw in FAMILIES.items()}


def at_once(raw, ids: list[int]) -> str:
    return raw.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@given(st.lists(st.integers(0, 268)))
def test_byte_level_pieces_are_the_whole_for_any_ids(ids: list[int]) -> None:
    """Also for bytes that are no UTF-8, special tokens, added tokens and ids without a token."""
    detokenizer = TOKENIZERS["byte level"].detokenizer()
    pieces = [detokenizer.push(token) for token in ids] + [detokenizer.flush()]
    assert "".join(pieces) == at_once(BYTE_LEVEL, ids)


@given(st.sampled_from(["sentencepiece", "sentencepiece, first space kept", "metaspace"]), st.data())
def test_sentencepiece_pieces_are_the_whole(family: str, data: st.DataObject) -> None:
    """For ids whose byte runs are UTF-8; invalid runs are spelled out byte by byte by the reference."""
    raw = FAMILIES[family]
    pieces = st.integers(0, len(raw) + 1).filter(lambda i: not str(raw.convert_ids_to_tokens(i)).startswith("<0x"))
    runs = pieces.map(lambda i: [i])
    if family != "metaspace":
        runs |= st.text(max_size=4).map(lambda text: [1 + byte for byte in text.encode()])
    ids = list(itertools.chain(*data.draw(st.lists(runs))))
    assert TOKENIZERS[family].decode(ids) == at_once(raw, ids)


def test_a_character_comes_out_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("a😀b")
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push(token) for token in ids] == ["a", "", "", "", "😀", "b"]
    for token in tokenizer.encode("é")[:1]:
        assert detokenizer.push(token) == ""
    assert detokenizer.flush() == "\ufffd"


def test_invalid_bytes_are_not_held_back() -> None:
    """A model that goes on and on with broken characters still streams."""
    tokenizer = TOKENIZERS["sentencepiece"]
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(1 + 0x80) for _ in range(1000)]
    assert all(piece == "\ufffd" for piece in pieces)


def test_a_decoder_that_is_not_known_is_refused_by_name() -> None:
    raw = fakes.byte_level()
    raw.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        Tokenizer(raw, "bert")


def brute_force(text: str, stop: list[str]) -> str:
    """Character by character: the first end of any stop string, and of those the longest."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return text


LETTERS = st.text("ab\n", min_size=1, max_size=5)


@given(st.lists(st.text("ab\n", max_size=4)), st.lists(LETTERS, max_size=3))
def test_stop_strings_cut_where_reading_the_whole_text_would(parts: list[str], stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    out: list[Piece] = []
    seen = ""
    for number, part in enumerate(parts):
        out += matcher.push(Piece(part, number % 2 == 0))
        seen += part
        if matcher.matched is not None:
            break
        held = len(seen) - sum(len(piece.text) for piece in out)
        assert held == max((n for s in stop for n in range(len(s)) if seen.endswith(s[:n])), default=0)
    out += matcher.flush()
    assert "".join(piece.text for piece in out) == brute_force("".join(parts), stop)
    assert (matcher.matched is not None) == any(s in "".join(parts) for s in stop)


@given(st.lists(st.text("ab", min_size=1, max_size=3)), LETTERS)
def test_pieces_keep_their_marks_through_holding_back(parts: list[str], stop: str) -> None:
    matcher = StopMatcher([stop])
    marked: list[tuple[str, bool]] = []
    for number, part in enumerate(parts):
        if matcher.matched is None:
            marked += [(c, p.drafted) for p in matcher.push(Piece(part, number % 3 == 0)) for c in p.text]
    marked += [(c, p.drafted) for p in matcher.flush() for c in p.text]
    whole = [(c, number % 3 == 0) for number, part in enumerate(parts) for c in part]
    assert marked == whole[: len(marked)]


def test_chat_template_says_where_the_answer_begins() -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert TOKENIZERS["byte level"].render(messages) == "<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in %}", "TemplateSyntaxError"),
        ("{{ messages[7]['content'] + 1 }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        (None, "no chat template"),
    ],
)
def test_a_chat_template_that_fails_is_one_clear_line(template: str | None, says: str) -> None:
    tokenizer = Tokenizer(fakes.byte_level(template), "tiny")
    with pytest.raises(InvalidRequest, match=says) as caught:
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert "\n" not in str(caught.value)
    assert "tiny" in str(caught.value)


@pytest.mark.parametrize(
    "messages", [[], [{"role": "user"}], [{"role": "user", "content": 3}], ["hi"], [{"content": "hi", "role": None}]]
)
def test_messages_of_the_wrong_shape_are_refused(messages: list) -> None:
    with pytest.raises(InvalidRequest, match="message"):
        TOKENIZERS["byte level"].encode_chat(messages)


def test_a_lone_surrogate_is_refused_with_its_position() -> None:
    with pytest.raises(InvalidRequest, match="position 2"):
        TOKENIZERS["byte level"].encode("ab\udc80")


def test_a_text_longer_than_the_tokenizer_expects_is_the_engines_business(caplog, monkeypatch) -> None:
    """transformers would warn on stderr; the engine refuses what is too long, with both numbers."""
    raw = fakes.byte_level()
    raw.model_max_length = 4
    tokenizer = Tokenizer(raw, "tiny")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING", logger="transformers"):
        assert len(tokenizer.encode("a" * 9)) == 9
        assert len(tokenizer.encode_chat([{"role": "user", "content": "a" * 9}])) == 12
    assert caplog.records == []


def test_load_from_a_folder_and_from_one_without_a_tokenizer(tmp_path) -> None:
    BYTE_LEVEL.save_pretrained(tmp_path / "good")
    tokenizer = Tokenizer.load(tmp_path / "good")
    assert tokenizer.decode(tokenizer.encode(" the née 你 😀")) == " the née 你 😀"
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text("{")
    for name in ("bad", "absent"):
        with pytest.raises(CorruptModel, match=name):
            Tokenizer.load(tmp_path / name)
