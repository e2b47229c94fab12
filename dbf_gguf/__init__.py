"""dbf-gguf: Double Binary Factorization of Llama-family models, written as GGUF for a patched llama.cpp."""

__version__ = "0.1.0"
