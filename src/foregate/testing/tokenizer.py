"""The tokenizer of every checkpoint built here: byte-level, 280 tokens, built offline, loadable by AutoTokenizer."""

# mypy: allow-untyped-calls
from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = 256, 257, 258
"""Token ids; 0 … 255 are the single bytes in the order of the byte-level alphabet."""

VOCAB_SIZE = 288
"""Rows of the embedding: 8 more than there are tokens, because hub checkpoints pad theirs."""

SPECIALS = ("<s>", "</s>", "<pad>")

MERGES = (
    *(("Ġ", "t"), ("h", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("r", "e"), ("o", "n"), ("Ġt", "he")),
    *(("e", "s"), ("e", "n"), ("o", "r"), ("a", "t"), ("o", "u"), ("in", "g"), ("Ġ", "a"), ("Ġa", "n")),
    *(("Ġan", "d"), ("Ġ", "o"), ("Ġo", "f"), ("i", "s"), ("l", "l")),
)
"""Enough merges that a token may be several characters; several tokens may be one character (any non-ASCII one)."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Token string → id."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIALS, *("".join(pair) for pair in MERGES)]
    return {name: index for index, name in enumerate(names)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer itself. It adds no special tokens to a prompt."""
    backend = Tokenizer(models.BPE(vocab=vocabulary(), merges=list(MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=CHAT_TEMPLATE
    )


def save_tokenizer(directory: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` to ``directory``."""
    build_tokenizer().save_pretrained(directory)
