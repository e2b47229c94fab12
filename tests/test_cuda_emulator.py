"""The emulator that runs CUDA kernels on the CPU: does it find what it is there to find?

Every kernel of cuda/selftest.cpp but the sound ones has one defect. A green result of test_cuda_kernels.py means as
much as the list below.

Run alone: pytest tests/test_cuda_emulator.py     (half a minute, after CUDA's compiler is fetched once)
"""

import os
import subprocess

import ptx_to_cpp
import pytest
from emulator import BUILDS, HERE, Emulator, run

# kernel -> build that must find it -> what the message says
DEFECTS = {
    "shared memory read past its end": {"asan": "heap-buffer-overflow"},
    "global memory read past its end": {"asan": "heap-buffer-overflow"},
    "global memory written past its end": {"asan": "heap-buffer-overflow"},
    "misaligned vector load": {"asan": "misaligned address"},
    "no __syncthreads between warps": {"tsan": "data race"},
    "no __syncwarp between lanes": {"tsan": "data race"},
    "a shuffle for a barrier": {"tsan": "data race"},
    "no barrier before shared memory is written again": {"tsan": "data race"},
    "blocks add to one place": {"tsan": "data race"},
    "early launch that does not wait": {"tsan": "data race"},
    "no barrier after an early launch that waits": {"tsan": "data race"},
    **{
        name: dict.fromkeys(BUILDS, message)
        for name, message in {
            "barrier that half of the warps reach": "thread exits while others wait in __syncthreads",
            "barrier after an exit": "__syncthreads after some threads have exited",
            "lanes of a warp in different functions": "lanes of a warp are in different warp functions",
            "mask with an exited lane": "thread exits while its warp waits for it",
            "deadlock between a barrier and a shuffle": "deadlock",
            "block size that is no multiple of 32": "block size",
        }.items()
    },
}
# These run to the end, with a result that depends on what must not matter: the poison, the order of the warps.
VISIBLE = {
    "uninitialised shared memory": -1,
    "shared memory kept from the block before": -1,
    "no __syncthreads between warps": -1,
    "no __syncwarp between lanes": -1,
}
SOUND = ("sound", "early launch that waits")


@pytest.fixture(scope="module")
def emulator(cuda_toolkit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    return Emulator(cuda_toolkit, folder, folder)


@pytest.fixture(scope="module")
def selftest(emulator):
    return {build: emulator.program(HERE / "selftest.cpp", build) for build in BUILDS}


def test_every_kernel_is_listed(selftest):
    assert set(run(selftest["plain"]).stdout.splitlines()) == {*DEFECTS, *VISIBLE, *SOUND}


@pytest.mark.parametrize("build", BUILDS)
def test_sound_kernels_run(selftest, build):
    for seed in range(4):
        for kernel in SOUND:
            result = run(selftest[build], kernel, seed)
            assert result.returncode == 0, result.stderr
            assert kernel != "sound" or result.stdout == f"ran to the end: {sum(range(64))}\n"


@pytest.mark.parametrize("kernel", DEFECTS)
def test_defects_are_found(selftest, kernel):
    for build, message in DEFECTS[kernel].items():
        result = run(selftest[build], kernel)
        assert result.returncode != 0 and message in result.stderr, (build, result.stdout, result.stderr)


def test_visible_defects_change_the_result(selftest):
    for kernel, value in VISIBLE.items():
        assert run(selftest["plain"], kernel).stdout == f"ran to the end: {value}\n", kernel


# --- the translator

PTX = """
.version 9.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
	.param .u64 kernel_param_0,
	.param .u32 kernel_param_1
)
{
	.reg .pred %p<2>;
	.reg .b32 %r<9>;
	.reg .b64 %rd<9>;
	@INSTRUCTION@
	ret;
}
"""


@pytest.mark.parametrize("instruction", [
    "tex.2d.v4.f32.s32 {%r1, %r2, %r3, %r4}, [memory, {%r5, %r6}];",
    "add.sat.s32 %r1, %r2, %r3;",
    "mul.rz.f32 %r1, %r2, %r3;",
    "add.f64 %rd1, %rd2, %rd3;",
    "ld.global.frobnicate.u32 %r1, [%rd1];",
    "cvt.rz.f32.s32 %r1, %r2;",
    "mma.sync.aligned.m8n8k32.row.col.s32.u4.s4.s32 {%r1, %r2}, {%r3}, {%r4}, {%r5, %r6};",
    "mov.u32 %r1, %clock;",
    "bar.sync 1;",
    "call.uni function, (%r1);",
])
def test_unknown_instructions_are_refused_by_name(instruction):
    with pytest.raises(ptx_to_cpp.Unknown, match=instruction.split()[0].replace(".", r"\.")):
        ptx_to_cpp.translate(PTX.replace("@INSTRUCTION@", instruction))


def test_translated_ptx_computes_what_the_source_does(emulator):
    """Integers, shifts, conversions, shuffles, vectors, shared memory and both kinds of mma in one kernel: results of
    the source under g++ and of the PTX are the same bits."""
    expected = run(instructions(emulator, None))
    assert expected.returncode == 0, expected.stderr
    assert len(set(expected.stdout.splitlines())) > 100  # not all zeros
    for arch in (75, 80, 120):
        result = run(instructions(emulator, arch))
        assert result.returncode == 0, result.stderr
        assert result.stdout == expected.stdout, arch


@pytest.mark.parametrize("defect, message", {
    "misaligned": "misaligned access",
    "read": "read out of bounds",
    "write": "write out of bounds",
    "shared": "write out of bounds",
    "constant": "write to a buffer that is an input",
}.items())
def test_translated_ptx_checks_its_accesses(emulator, defect, message):
    result = run(instructions(emulator, 80), defect)
    assert result.returncode != 0 and message in result.stderr


def instructions(emulator, arch: int | None):
    """The program of instructions.cpp with the kernel's source, or with its PTX for `arch`."""
    kernel = HERE / "instructions.cu"
    made = emulator.ptx_object(kernel, arch, "plain") if arch else emulator.source_object(kernel, "asan")
    return emulator.program(HERE / "instructions.cpp", "plain" if arch else "asan", made, name=f"instructions-{arch}")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="this machine has no other way than the one tested above")
def test_switching_stacks_without_assembly(emulator):
    """Machines other than x86-64 switch by swapcontext."""
    portable = emulator._compile(HERE / "cuhost.cpp", "cuhost-portable.o", "-O2", "-DCUHOST_UCONTEXT")
    main = emulator._compile(HERE / "selftest.cpp", "selftest-plain.o", *BUILDS["plain"])
    program = emulator.folder / "selftest-portable"
    subprocess.run([emulator.compiler[-1], main, portable, "-o", program], check=True)
    assert run(program, "sound", 5).stdout == f"ran to the end: {sum(range(64))}\n"
