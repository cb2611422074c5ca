"""GGUF, the container of llama.cpp: blocks, mixtures, metadata, writer and reader (layout: docs/formats/gguf.md)."""

from quantkit.formats.gguf.read import READING
from quantkit.formats.gguf.write import NAME

__all__ = ["NAME", "READING"]
