"""What this process may use of the machine: CPUs, memory, compilers, NVIDIA cards."""

import ctypes
import os
import shutil
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # a container's, cgroup v2; "max" where there is none

CUDA_DRIVER = "libcuda.so.1"  # comes with NVIDIA's driver, so a machine with a toolkit alone lacks it


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_features() -> dict:
    """Instruction sets of the CPU by torch's names, such as "avx512_bf16"; {} from a torch that cannot tell."""
    import torch  # slow, and most of what this module is for does without

    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def available_memory() -> int:
    """Bytes of physical memory that this process may use; a container's limit counts."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):
        return physical


def compiler(variable: str, *names: str) -> list[str]:
    """The command that cmake would take: the environment's compiler, else the first of `names` on the PATH, else []."""
    given = os.environ.get(variable, "").split()
    for command in [given] if given else [[name] for name in names]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]  # as in CXX="ccache g++"
    return []


def cuda_driver() -> ctypes.CDLL | None:
    """The driver's library. Without it no program that uses CUDA starts, even one that would not compute with it."""
    try:
        return ctypes.CDLL(CUDA_DRIVER)
    except OSError:
        return None


def cuda_capabilities() -> list[int]:
    """Compute capabilities of the NVIDIA cards that the driver shows, 89 for 8.9: sorted, each once, [] without a card.

    The driver is asked itself: this works before anything of CUDA is compiled, and where no nvidia-smi is installed.
    """
    driver = cuda_driver()
    if driver is None:
        return []
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = set()
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        statuses = (
            driver.cuDeviceGet(ctypes.byref(device), index),
            driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device),  # COMPUTE_CAPABILITY_MAJOR
            driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),  # COMPUTE_CAPABILITY_MINOR
        )
        if not any(statuses):
            found.add(10 * major.value + minor.value)
    return sorted(found)
