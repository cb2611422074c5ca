"""The shipped text keeps its promises, and text of one's own gets clear errors."""

import gzip
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from quantkit.errors import RefusedError, UnavailableError
from quantkit.home import shipped
from quantkit.texts import known_sha256, load_text_set, read_documents

SHINGLE_WORDS = 8


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def both():
    return load_text_set("polish-core", "calibration"), load_text_set("polish-core", "validation")


def test_there_is_enough_in_enough_registers():
    calibration, validation = both()
    size = sum(len(document.content.encode()) for text in (calibration, validation) for document in text.documents)
    assert size >= 150_000
    registers = Counter(document.register for document in calibration.documents)
    assert len(registers) >= 10
    assert registers.keys() == {document.register for document in validation.documents}
    assert "" not in registers


def test_calibration_and_validation_share_nothing():
    calibration, validation = both()
    more = load_text_set("polish-plus", "calibration").documents
    seen = set().union(*(shingles(document.content) for document in (*calibration.documents, *more)))
    checked = 0
    for document in validation.documents:
        found = shingles(document.content)
        checked += len(found)
        assert len(found & seen) <= 0.01 * len(found), document.content[:80]
    assert checked > 2000


def test_no_document_stands_twice():
    texts = [*both(), load_text_set("polish-plus", "calibration")]
    contents = [document.content for text in texts for document in text.documents]
    assert len(set(contents)) == len(contents)


def test_it_is_polish_with_all_its_letters():
    text = "".join(document.content for part in both() for document in part.documents)
    counts = Counter(text.lower())
    letters = sum(count for letter, count in counts.items() if letter.isalpha())
    for letter in "ąćęłńóśźż":
        assert counts[letter] / letters > 0.0004, letter
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f�]", text)


def test_chats_with_and_without_a_system_message():
    chats = [document for part in both() for document in part.documents if document.messages]
    starts = Counter(document.messages[0][0] for document in chats)
    assert starts["system"] >= 4
    assert starts["user"] >= 4
    for document in chats:
        roles = [role for role, _ in document.messages if role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_the_datasheet_counts_right():
    sheet = (shipped("calibration") / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+) \| (\d+) \|", sheet, re.M))
    registers = Counter(document.register for text in both() for document in text.documents)
    assert {register: int(number) for register, number in rows.items()} == registers


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_own_files(tmp_path):
    lines = [{"text": "Ala ma kota."}, {"messages": [{"role": "user", "content": "Cześć"}], "register": "chat"}]
    path = write(tmp_path / "own.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n\n")
    found = load_text_set(str(path), "validation")
    assert found.name == "own.jsonl"
    assert [document.content for document in found.documents] == ["Ala ma kota.", "Cześć"]
    plain = load_text_set(str(write(tmp_path / "own.txt", "Jeden dokument.\n\nCały plik.\n")), "calibration")
    assert [document.text for document in plain.documents] == ["Jeden dokument.\n\nCały plik."]


def test_poleval_has_a_document_per_line(tmp_path):
    path = write(tmp_path / "corpus.txt", "Pierwsze zdanie .\n\nDrugie zdanie .\n")
    assert [document.text for document in read_documents(path)] == ["Pierwsze zdanie .", "Drugie zdanie ."]


def test_parquet_as_the_public_sets_have_it(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.table({"id": ["1", "2", "3"], "text": ["Pierwszy.", " ", "Trzeci."]}), path)
    assert [document.text for document in read_documents(path)] == ["Pierwszy.", "Trzeci."]


def test_files_may_be_packed(tmp_path):
    line = json.dumps({"text": "Ala ma kota.\u2028I psa."}, ensure_ascii=False)
    path = write(tmp_path / "own.jsonl.gz", gzip.compress(f"{line}\r\n".encode()))
    (document,) = load_text_set(str(path), "validation").documents
    assert document.text == "Ala ma kota.\u2028I psa.", "a line ends where JSON lines do"
    plain = write(tmp_path / "own.txt.gz", gzip.compress(b"Jeden\r\ndokument."))
    assert [document.text for document in read_documents(plain)] == ["Jeden\ndokument."]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", '{"text": "Jeż \\ud83e\\udd94"}'), ("a.txt", "Jeż 🦔"), ("a.corpus.txt", "Jeż 🦔")],
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    path = write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
    found = load_text_set(str(path), "calibration")
    assert [document.text for document in found.documents] == ["Jeż 🦔"]
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest(), "the hash is of the file"


def test_tokenized_sentences_without_a_text_to_belong_to_stand_alone(tmp_path):
    lines = [{"tokens": ["Jeż", "śpi", "."], "nps": [False, False, True]}] * 2
    path = write(tmp_path / "own.jsonl", "\n".join(json.dumps(line) for line in lines))
    assert [document.text for document in read_documents(path)] == ["Jeż śpi."] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\xff\xfe{}", "not valid UTF-8 at byte 0"),
        ("a.txt", b"ab\x00" + b"\xc3\x28", "not valid UTF-8 at byte 3"),
        ("a.jsonl", "", "there is no text in it"),
        ("a.txt", " \n ", "there is no text in it"),
        ("a.jsonl", '{"text": ""}', "the line is not a document"),
        ("a.jsonl", '{"text": "ok"}\n{"txt": "x"}', "the line is not a document"),
        ("a.jsonl", "[1]", "the line is not a document"),
        ("a.jsonl", '{"messages": []}', "the line is not a document"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "the line is not a document"),
        ("a.jsonl", '{"messages": {"role": "user", "content": "x"}}', "the line is not a document"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": {"text": "x"}}]}', "the line is not a document"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": null}]}', "the line is not a document"),
        ("a.jsonl", '{"messages": [{"role": 1, "content": "x"}]}', "the line is not a document"),
        ("a.jsonl", "{", "the line is not a document"),
        ("a.jsonl", "[" * 200_000, "the line is not a document"),
        ("a.jsonl", f'{{"text": "x", "n": {"9" * 5000}}}', "the line is not a document"),
        ("a.jsonl", r'{"text": "a\ud800b"}', r"not valid Unicode text: \ud800 is half of a surrogate pair"),
        (
            "a.jsonl",
            r'{"messages": [{"role": "user", "content": "\udc00"}]}',
            r"not valid Unicode text: \udc00 is half of a surrogate pair",
        ),
        (
            "a.jsonl",
            r'{"tokens": ["a", "\ud83d"], "nps": [true, true], "nkjp_text": "1"}',
            r"not valid Unicode text: \ud83d is half of a surrogate pair",
        ),
        ("a.txt", b"\xef\xbb\xbf", "there is no text in it"),
        ("a.txt", b"\xef\xbb\xbfab\xc3\x28", "not valid UTF-8 at byte 5"),
        ("a.jsonl", '{"tokens": ["a", "b"], "nps": [true]}', "the line is not a tokenized sentence"),
        ("a.jsonl", '{"tokens": []}', "the line is not a tokenized sentence"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "ok"}', mtime=0)[:-9],
            "it cannot be unpacked: Compressed file ended before the end-of-stream marker was reached",
        ),
        ("a.jsonl.gz", b'{"text": "ok"}', "it cannot be unpacked: Not a gzipped file (b'{\"')"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "there is no text in it"),
    ],
)
def test_files_that_are_not_text(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(RefusedError) as caught:
        load_text_set(str(path), "calibration")
    assert caught.value.what == message
    assert str(path) in caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize(
    "line", ['{"txt": "x"}', "[" * 200_000, r'{"text": "\ud800"}', '{"messages": [{"role": "user", "content": []}]}']
)
def test_the_line_is_named(tmp_path, line):
    path = write(tmp_path / "a.jsonl", f'{{"text": "ok"}}\n{line}')
    with pytest.raises(RefusedError) as caught:
        load_text_set(str(path), "calibration")
    assert caught.value.where == f"{path}:2"


def test_polish_plus_is_for_calibration_alone():
    assert (
        sum(len(document.content.encode()) for document in load_text_set("polish-plus", "calibration").documents)
        > 100_000
    )
    with pytest.raises(RefusedError, match="the text set polish-plus has no validation half"):
        load_text_set("polish-plus", "validation")


@pytest.mark.parametrize(
    ("name", "split"),
    [("polish-core", "calibration"), ("polish-core", "validation"), ("polish-plus", "calibration")],
)
def test_a_set_without_its_chats_is_another_set(name, split):
    whole, documents = load_text_set(name, split), load_text_set(f"{name}-documents", split)
    assert documents.documents == tuple(document for document in whole.documents if document.text)
    assert 0 < len(documents.documents) < len(whole.documents)
    assert documents.name == f"{name}-documents"
    assert documents.sha256 != whole.sha256
    assert documents.sha256 == known_sha256(f"{name}-documents", split)
    assert whole.sha256 == known_sha256(name, split)


@pytest.mark.parametrize("name", ["polish-cor", "", "a\0.txt", "a" * 300 + ".txt"])
def test_unknown_set(name):
    with pytest.raises(RefusedError) as caught:
        load_text_set(name, "calibration")
    assert str(caught.value) == (
        f"no text set {name!r}\n"
        "  at:  calibration.texts\n"
        "  fix: use one of polish-core, polish-core-documents, polish-plus, polish-plus-documents, nkjp1m, "
        "wikipedia-pl, poleval2018, or the path of a .jsonl or .txt file that exists"
    )


def test_what_is_behind_the_at_sign_must_be_a_commit():
    with pytest.raises(RefusedError) as caught:
        load_text_set("wikipedia-pl@main", "validation")
    assert str(caught.value) == (
        "'wikipedia-pl@main' does not name a commit\n"
        "  at:  validation.texts\n"
        "  fix: write wikipedia-pl@ and the 40 hex digits of one"
    )


def test_a_public_set_without_a_network_names_the_way_out():
    with pytest.raises(UnavailableError) as caught:
        load_text_set("wikipedia-pl", "calibration")
    assert caught.value.exit_code == 4
    assert """--set 'calibration.texts={"polish-core"=24}'""" in caught.value.fix
