"""GGUF, the container of llama.cpp: blocks, mixtures, metadata, writer and reader (layout: docs/formats/gguf.md)."""
