"""dbf-gguf: Double Binary Factorization of Llama-family models, written as GGUF for a patched llama.cpp."""

__version__ = "0.1.0"


def load(work_dir, **options):
    """See `dbf_gguf.model.load`; imported when called, so that the command line need not wait for torch."""
    from .model import load

    return load(work_dir, **options)
