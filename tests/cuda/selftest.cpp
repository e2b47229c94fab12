// Small kernels with one defect each (and sound ones), to see that cuhost.h finds them: `selftest NAME` runs one.
// A defect that is found ends the program; one that is not prints "ran to the end". test_cuda_emulator.py says which of the
// sanitizer builds has to find which.

#include "cuhost.h"

#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <string>

static int * shared_ints() {
    return (int *) cuhost::shared_memory();
}

static int seen;  // for results that may differ; main prints it

static std::map<std::string, std::function<void()>> kernels() {
    static std::unique_ptr<int[]> in(new int[64]), out(new int[64]);
    for (int i = 0; i < 64; ++i) {
        in[i] = i;
        out[i] = 0;
    }
    int * a = in.get();
    int * o = out.get();
    std::map<std::string, std::function<void()>> k;

    // ---- sound

    // every warp function and barrier once; the sum of 0..63 comes out in every thread
    k["sound"] = [=] {
        cuhost::launch(3, 64, 64*sizeof(int), [=] {
            int * s = shared_ints();
            const int t = (int) threadIdx.x;
            int v = a[t];
            for (int bits = 16; bits > 0; bits /= 2) {
                v += __shfl_xor_sync(~0u, v, bits);
            }
            s[t] = v;
            __syncwarp();
            v = s[t ^ 5];
            __syncthreads();
            s[t] = v;
            __syncthreads();
            v = s[t] + s[(t + 32) % 64];
            if (__ballot_sync(~0u, t % 2) != 0xaaaaaaaa || __shfl_down_sync(~0u, t, 1) != (t % 32 < 31 ? t + 1 : t)) {
                v = -1;
            }
            if (blockIdx.x == 2) {
                o[t] = v;
            }
        });
        cuhost::synchronize();
        seen = o[0];
        for (int i = 0; i < 64; ++i) {
            seen = o[i] == seen ? seen : -1;
        }
    };

    // ---- memory

    k["shared memory read past its end"] = [=] {
        cuhost::launch(1, 64, 64*sizeof(int), [=] { o[threadIdx.x] = shared_ints()[threadIdx.x + 1]; });
    };
    k["global memory read past its end"] = [=] {
        cuhost::launch(1, 64, 0, [=] { o[threadIdx.x] = a[threadIdx.x + 1]; });
    };
    k["global memory written past its end"] = [=] {
        cuhost::launch(2, 64, 0, [=] { o[64*blockIdx.x + threadIdx.x] = 1; });
    };
    k["misaligned vector load"] = [=] {
        cuhost::launch(1, 32, 0, [=] {
            const uint4 v = __ldg((const uint4 *) (a + threadIdx.x));
            o[threadIdx.x] = (int) v.x;
        });
    };
    k["uninitialised shared memory"] = [=] {
        cuhost::launch(1, 32, 32*sizeof(int), [=] { o[threadIdx.x] = shared_ints()[threadIdx.x]; });
        cuhost::synchronize();
        seen = o[7];
    };
    k["shared memory kept from the block before"] = [=] {
        cuhost::launch(2, 32, 32*sizeof(int), [=] {
            int * s = shared_ints();
            if (blockIdx.x == 0) {
                s[threadIdx.x] = 7;
            } else {
                o[threadIdx.x] = s[threadIdx.x];
            }
        });
        cuhost::synchronize();
        seen = o[7];
    };

    // ---- races

    k["no __syncthreads between warps"] = [=] {
        cuhost::launch(1, 64, 64*sizeof(int), [=] {
            int * s = shared_ints();
            s[threadIdx.x] = a[threadIdx.x];
            __syncwarp();
            o[threadIdx.x] = s[63 - threadIdx.x];
        });
        cuhost::synchronize();
        seen = o[0];
    };
    k["no __syncwarp between lanes"] = [=] {
        cuhost::launch(1, 32, 32*sizeof(int), [=] {
            int * s = shared_ints();
            s[threadIdx.x] = a[threadIdx.x];
            o[threadIdx.x] = s[31 - threadIdx.x];
        });
        cuhost::synchronize();
        seen = o[0];
    };
    k["a shuffle for a barrier"] = [=] {
        cuhost::launch(1, 32, 32*sizeof(int), [=] {
            int * s = shared_ints();
            s[threadIdx.x] = a[threadIdx.x];
            const int v = __shfl_sync(~0u, 1, 0);
            o[threadIdx.x] = v*s[31 - threadIdx.x];
        });
    };
    k["no barrier before shared memory is written again"] = [=] {
        cuhost::launch(1, 64, 64*sizeof(int), [=] {
            int * s = shared_ints();
            for (int i = 0; i < 2; ++i) {
                s[threadIdx.x] = a[threadIdx.x] + i;
                __syncthreads();
                o[threadIdx.x] = s[63 - threadIdx.x];
            }
        });
    };
    for (const bool waits : {false, true}) {
        k[waits ? "early launch that waits" : "early launch that does not wait"] = [=] {
            cuhost::launch(1, 32, 0, [=] { o[threadIdx.x] = 1; });
            cuhost::launch(1, 32, 0, [=] {
                if (waits) {
                    cuhost::wait_for_previous_grid();
                }
                o[32 + threadIdx.x] = o[31 - threadIdx.x];
            }, cuhost::start::early);
        };
    }
    // the wait orders the grids, not the threads of one of them
    k["no barrier after an early launch that waits"] = [=] {
        cuhost::launch(1, 64, 0, [=] { o[threadIdx.x] = 1; });
        cuhost::launch(1, 64, 64*sizeof(int), [=] {
            int * s = shared_ints();
            if (threadIdx.x < 32) {
                s[threadIdx.x] = a[threadIdx.x];
            } else {
                cuhost::wait_for_previous_grid();
                o[threadIdx.x] = s[63 - threadIdx.x];
            }
        }, cuhost::start::early);
    };
    k["blocks add to one place"] = [=] {
        cuhost::launch(4, 32, 0, [=] {
            if (threadIdx.x == 0) {
                o[0] += 1;
            }
        });
    };

    // ---- divergence

    k["barrier that half of the warps reach"] = [=] {
        cuhost::launch(1, 64, 0, [=] {
            if (threadIdx.x < 32) {
                __syncthreads();
            }
        });
    };
    k["barrier after an exit"] = [=] {
        cuhost::launch(1, 64, 0, [=] {
            if (threadIdx.x < 32) {
                return;
            }
            __syncthreads();
        });
    };
    k["lanes of a warp in different functions"] = [=] {
        cuhost::launch(1, 32, 0, [=] {
            o[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(~0u, 1, 1) : (int) __ballot_sync(~0u, 1);
        });
    };
    k["mask with an exited lane"] = [=] {
        cuhost::launch(1, 32, 0, [=] {
            if (threadIdx.x < 20) {
                o[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
            }
        });
    };
    k["deadlock between a barrier and a shuffle"] = [=] {
        cuhost::launch(1, 32, 0, [=] {
            if (threadIdx.x < 16) {
                __syncthreads();
            } else {
                o[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
            }
        });
    };
    k["block size that is no multiple of 32"] = [=] {
        cuhost::launch(1, 48, 0, [] {});
    };
    return k;
}

int main(int argc, char ** argv) {
    auto all = kernels();
    if (argc < 2) {
        for (const auto & k : all) {
            printf("%s\n", k.first.c_str());
        }
        return 0;
    }
    if (argc > 2) {
        cuhost::config.seed = (uint32_t) atoi(argv[2]);
    }
    all.at(argv[1])();
    cuhost::synchronize();
    printf("ran to the end: %d\n", seen);
}
