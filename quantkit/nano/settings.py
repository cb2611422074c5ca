"""Everything that decides the bytes of bielik-nano, but for the text."""

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[str, int, int], None]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate: user, assistant, user, ...') }}{% endif %}"
    "{% if turn['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + turn['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + turn['content'] + eos_token }}{% endif %}{% if not loop.last and turn['role'] == 'assistant' %}"
    "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class NanoSettings:
    """Everything that decides the model's bytes.

    Attributes:
        vocab_size, hidden, feed_forward, layers, heads, kv_heads, context: the architecture.
        steps, windows, window_tokens: of training.
        rate: peak learning rate of AdamW; `decay` its weight decay.
        noise: share of input tokens replaced at random, against learning the text by heart.
        smoothing: bigram counts are mixed with this many unigram counts.
        seed: of everything random.
        threads: CPU threads; another number rounds otherwise.
        edition: raised whenever the training makes another model from the same settings.
    """

    vocab_size: int = 768
    hidden: int = 256
    feed_forward: int = 512
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    context: int = 1024
    steps: int = 500
    windows: int = 16
    window_tokens: int = 128
    rate: float = 3e-3
    decay: float = 1.0
    noise: float = 0.2
    smoothing: float = 8.0
    seed: int = 0
    threads: int = 2
    edition: int = 2


USUAL = NanoSettings()
