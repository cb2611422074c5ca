"""bielik-nano: the shape of Bielik-7B, and enough sense that quantization costs something."""

import json
import multiprocessing
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.checkpoint.index import open_checkpoint
from quantkit.checkpoint.layer import Decoder
from quantkit.checkpoint.source import head_tensors
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.files import hash_files
from quantkit.grids.affine import AffineRule
from quantkit.home import quantkit_home
from quantkit.nano import ensure_nano, training
from quantkit.nano.settings import NanoSettings
from quantkit.texts import load_text_set
from quantkit.validation.perplexity import final_states, losses
from quantkit.validation.text import evaluation_text

SMALL = NanoSettings(hidden=64, feed_forward=64, layers=1, steps=2, windows=2, window_tokens=16)


def files(folder: Path) -> dict[str, str]:
    return hash_files(folder, sorted(path.name for path in folder.iterdir()))


def test_it_has_the_shape_of_everything(nano):
    checkpoint = open_checkpoint(nano)
    infos = checkpoint.tensors.tensors
    assert sum(info.num_elements for info in infos.values()) <= 4_000_000
    assert {info.dtype for info in infos.values()} == {"BF16"}
    assert len(checkpoint.tensors.files) == 2
    assert all(columns % 256 == 0 for _, _, columns in checkpoint.linear_shapes())
    config = checkpoint.config
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"] is False
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"


def test_transformers_loads_it_whole(nano):
    _, report = AutoModelForCausalLM.from_pretrained(nano, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_the_chat_template_is_bieliks(nano):
    tokenizer = AutoTokenizer.from_pretrained(nano)
    turns = [
        {"role": "system", "content": "Bądź zwięzły."},
        {"role": "user", "content": "Cześć!"},
        {"role": "assistant", "content": "Dzień dobry."},
        {"role": "user", "content": "Co słychać?"},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<s>[INST] <<SYS>>\nBądź zwięzły.\n<</SYS>>\n\nCześć! [/INST] Dzień dobry.</s>[INST] Co słychać? [/INST]"
    )
    assert tokenizer.apply_chat_template(turns[1:2], tokenize=False) == "<s>[INST] Cześć! [/INST]"
    with pytest.raises(Exception, match="roles must alternate"):
        tokenizer.apply_chat_template(turns[2:], tokenize=False)


def test_both_tokenizer_files_agree(nano):
    fast = AutoTokenizer.from_pretrained(nano)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(nano / "tokenizer.model"))
    assert len(fast) == pieces.get_piece_size()
    texts = [document.content for document in load_text_set("polish-core", "validation").documents]
    texts += [document.content for document in load_text_set("polish-core", "calibration").documents]
    texts += [
        " odstęp na początku",
        "  dwa na początku",
        " ",
        "",
        "dwa  odstępy",
        "😀 漢字 ¿",
        "a\n\nb\tc",
        "1 234,56 zł",
        "ŻÓŁĆ",
    ]
    for text in texts:
        ids = pieces.encode(text)
        assert fast.encode(text, add_special_tokens=False) == ids
        assert fast.decode(ids) == text
        assert 0 not in ids
    assert len(texts) > 130
    assert fast.encode("a</s>b", add_special_tokens=False).count(2) == 1
    assert fast.encode("a")[0] == 1


def rounded(checkpoint, bits: int):
    """A weight source in which every linear is rounded to the nearest of `bits` bits, groups of 128."""

    class Rounded:
        config, family, num_layers = checkpoint.config, checkpoint.family, checkpoint.num_layers

        def read(self, item):
            rule = AffineRule(bits)
            tensors = checkpoint.read(item)
            for name, tensor in tensors.items():
                if "_proj" in name:
                    groups = tensor.float().T.reshape(-1, 128, tensor.shape[0])
                    for group in groups:
                        scale, zero = rule.fit(group, torch.ones(128))
                        group.copy_((rule.encode(group, scale, zero) - zero) * scale)
                    tensors[name] = groups.reshape(-1, tensor.shape[0]).T
            return tensors

    return Rounded()


def test_fewer_bits_cost_more(nano):
    checkpoint = open_checkpoint(nano)
    tokenizer = load_tokenizer(nano, vocab_size=checkpoint.config["vocab_size"])
    text = evaluation_text([(load_text_set("polish-core", "validation"), None)], tokenizer, window_tokens=512)
    decoder = Decoder(checkpoint.config, checkpoint.family, device=torch.device("cpu"), dtype=torch.float32)

    def perplexity(source) -> float:
        states = final_states(source, text, decoder, windows_per_batch=8)
        return float(losses(states, decoder.head(head_tensors(source)), text.targets).mean().exp())

    found = {bits: perplexity(rounded(checkpoint, bits)) for bits in (8, 4, 3, 2)}
    plain = perplexity(checkpoint)
    assert found[8] < found[4] < found[3] < found[2]
    assert found[2] > 1.1 * plain
    assert found[8] < 1.005 * plain


def test_made_twice_it_has_the_same_bytes(tmp_path, monkeypatch):
    folders = []
    for name in ("a", "b"):
        monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / name))
        folders.append(ensure_nano(settings=SMALL))
    assert files(folders[0]) == files(folders[1])
    assert len(files(folders[0])) >= 8


def test_it_is_kept_until_something_changes(monkeypatch):
    steps = []

    def progress(stage, done, total):
        steps.append((stage, done, total))

    first = ensure_nano(progress, SMALL)
    assert steps == [("train bielik-nano", 1, 2), ("train bielik-nano", 2, 2)]
    assert ensure_nano(progress, SMALL) == first
    assert len(steps) == 2
    before = files(first)
    ensure_nano(progress, NanoSettings(**{**SMALL.__dict__, "seed": 1}))
    assert len(steps) == 4
    assert files(first) != before


def test_no_file_names_the_folder_it_was_made_in(tmp_path):
    folder = ensure_nano(settings=SMALL)
    assert not [path.name for path in folder.iterdir() if str(tmp_path).encode() in path.read_bytes()]


def test_a_damaged_marker_is_no_error():
    folder = ensure_nano(settings=SMALL)
    before = files(folder)
    (folder / "nano.json").write_bytes(b'{"finger\xff')
    assert files(ensure_nano(settings=SMALL)) == before


def test_the_callers_random_state_and_threads_stay(monkeypatch):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    restored = []
    monkeypatch.setattr(torch, "set_num_threads", restored.append)
    ensure_nano(settings=SMALL)
    assert restored == [2, 1]
    assert torch.equal(torch.rand(3), expected)


def report_steps(queue) -> None:
    steps = []
    folder = ensure_nano(lambda *step: steps.append(step), SMALL)
    queue.put((len(steps), len(files(folder))))


def test_two_processes_make_it_once():
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    processes = [spawn.Process(target=report_steps, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(found) == [(0, 10), (2, 10)]


def test_a_broken_off_training_leaves_nothing(monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", fail)
        with pytest.raises(KeyboardInterrupt):
            ensure_nano(settings=SMALL)
    assert not (quantkit_home() / "models" / "bielik-nano").exists()
    assert json.loads((ensure_nano(settings=SMALL) / "nano.json").read_text())["fingerprint"]
