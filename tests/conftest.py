"""Session fixtures that more than one test file needs. Both are slow once and fast ever after: the cache keeps them."""

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see dbf_gguf/cli/convert.py

from dbf_gguf import llama_cpp  # noqa: E402
from dbf_gguf.errors import DBFError  # noqa: E402


@pytest.fixture(scope="session")
def patched_tree():
    """The pinned llama.cpp tree with the patch set applied; read-only."""
    return llama_cpp.source_tree()


@pytest.fixture(scope="session")
def llama_bin():
    """The folder of the built programs (minutes on a cold cache)."""
    return llama_cpp.build()


@pytest.fixture(scope="session")
def cuda_toolkit():
    """A CUDA toolkit root with bin/nvcc, bin/cuobjdump and bin/nvdisasm, from wheels; without cuBLAS."""
    return _toolkit_or_skip(cublas=False)


@pytest.fixture(scope="session")
def cuda_toolkit_with_cublas():
    """The same with cuBLAS, whose headers every file of ggml-cuda includes."""
    return _toolkit_or_skip(cublas=True)


def _toolkit_or_skip(cublas: bool):
    import toolchain

    try:
        return toolchain.toolkit_root(cublas)
    except DBFError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def one_thread():
    """For matrices so small that threads would mostly wait for each other; results depend on the number of threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
