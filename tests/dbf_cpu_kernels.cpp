// The CPU kernels of the DBF product, compiled for one instruction set and compared with their scalar reference.
// test-backend-ops sees only the instruction set that llama.cpp was built for; test_llama_cpp.py compiles this file with
// dbf.cpp of the patched tree once for each. Prints the largest normalized mean squared error; exit status 1 on failure.
//
// `dbf_cpu_kernels quick` leaves out what takes long in an emulator.
// `dbf_cpu_kernels LAYOUT N_IN K N_OUT TOKENS THREADS MIB` times instead: giga sign-weights a second (times tokens) of linears
// of this shape, in turn as many as fill MIB of memory. LAYOUT: `rows`, as in a file, or `tiles`, where that is faster.
// bench/cpu.py --micro makes a table of it.

#include "dbf.h"

#include "dbf-tables.h"
#include "ggml-cpu-impl.h"
#include "ggml-dbf.h"
#include "ggml.h"
#include "simd-mappings.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

// what dbf.cpp takes from the rest of ggml-cpu
static pthread_barrier_t barrier;

extern "C" {
float ggml_table_f32_f16[1 << 16];

void ggml_barrier(ggml_threadpool *) {
    pthread_barrier_wait(&barrier);
}

void ggml_cpu_fp16_to_fp32(const ggml_fp16_t * x, float * y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        y[i] = GGML_CPU_FP16_TO_FP32(x[i]);
    }
}
}

static std::mt19937 rng(1);

static void fill(ggml_tensor * t) {
    std::normal_distribution<float> normal;
    std::vector<float> v(ggml_nelements(t));
    for (float & f : v) {
        f = normal(rng);
    }
    if (t->type == GGML_TYPE_F32) {
        memcpy(t->data, v.data(), v.size()*sizeof(float));
    } else {
        ggml_quantize_chunk(t->type, v.data(), t->data, 0, t->ne[1], t->ne[0], nullptr);
    }
}

static std::vector<float> compute(ggml_tensor * op, bool use_ref, int n_threads) {
    // nothing may depend on what the buffers held before
    const size_t wsize = ggml_cpu_dbf_work_size(op, n_threads);
    std::vector<char> work(wsize, (char) 0xff);
    memset(op->data, 0xff, ggml_nbytes(op));

    pthread_barrier_init(&barrier, nullptr, n_threads);
    std::vector<std::thread> threads;
    for (int i = 0; i < n_threads; ++i) {
        threads.emplace_back([&, i] {
            ggml_compute_params params = { i, n_threads, wsize, work.data(), nullptr, use_ref };
            ggml_compute_forward_dbf_mul_mat(&params, op);
        });
    }
    for (auto & thread : threads) {
        thread.join();
    }
    pthread_barrier_destroy(&barrier);

    const float * y = (const float *) op->data;
    return std::vector<float>(y, y + ggml_nelements(op));
}

#if defined(DBF_TABLES)
static const double BOUND = 3e-7;
#else
static const double BOUND = 1e-7;
#endif

static int n_fail = 0;

static void check(bool ok, const char * what, int64_t n_in, int64_t k, int64_t n_out) {
    if (!ok) {
        printf("FAIL %s at n_in %lld k %lld n_out %lld\n", what, (long long) n_in, (long long) k, (long long) n_out);
        n_fail++;
    }
}

// the median of some rounds over all linears, each of a tenth of a second at least
static int bench(bool tiles, int64_t n_in, int64_t k, int64_t n_out, int64_t n_vec, int n_threads, int64_t mib) {
    const size_t signs  = (size_t) (n_in + n_out)*k;
    const int    n_ops  = (int) std::max<size_t>(1, ((size_t) mib << 20)*8/signs);
    ggml_init_params ip = { n_ops*(signs/8 + (n_in + k + n_out)*2 + n_out*n_vec*4 + 16384) + n_in*n_vec*4 + 16384, nullptr, false };
    ggml_context * ctx  = ggml_init(ip);
    ggml_tensor  * x    = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_in, n_vec);
    fill(x);
    std::vector<ggml_tensor *> ops;
    for (int i = 0; i < n_ops; ++i) {
        ggml_tensor * B = ggml_new_tensor_2d(ctx, GGML_TYPE_DBF, n_in, k);
        ggml_tensor * A = ggml_new_tensor_2d(ctx, GGML_TYPE_DBF, k, n_out);
        ggml_tensor * s[3];
        for (int j = 0; j < 3; ++j) {
            s[j] = ggml_new_tensor_1d(ctx, GGML_TYPE_F16, j == 0 ? n_in : j == 1 ? k : n_out);
            fill(s[j]);
        }
        for (ggml_tensor * t : { A, B }) {
            std::vector<uint32_t> rows(ggml_nbytes(t)/4);
            for (uint32_t & word : rows) {
                word = rng();
            }
            if (tiles) {
                ggml_cpu_dbf_set_tiles(t, rows.data());
            } else {
                memcpy(t->data, rows.data(), ggml_nbytes(t));
            }
        }
        ops.push_back(ggml_dbf_mul_mat(ctx, B, A, s[0], s[1], s[2], x));
    }

    const size_t wsize = ggml_cpu_dbf_work_size(ops[0], n_threads);
    std::vector<char> work(wsize);
    std::vector<double> rates;
    int n_rounds = 1;
    pthread_barrier_init(&barrier, nullptr, n_threads);
    const auto run = [&](int ith) {
        ggml_compute_params params = { ith, n_threads, wsize, work.data(), nullptr, false };
        for (int sample = 0; sample < 8; ++sample) {
            ggml_barrier(nullptr);
            const int  rounds = n_rounds; // thread 0 may change it before all are out of the loop
            const auto start = std::chrono::steady_clock::now();
            for (int round = 0; round < rounds; ++round) {
                for (ggml_tensor * op : ops) {
                    ggml_compute_forward_dbf_mul_mat(&params, op);
                    ggml_barrier(nullptr); // as ggml between two ops
                }
            }
            const double time = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
            if (ith == 0 && sample > 0) {
                rates.push_back((double) rounds*n_ops*signs*n_vec/time*1e-9);
            } else if (ith == 0) { // the first one warms up
                n_rounds = (int) std::max(1.0, 0.1/time);
            }
            ggml_barrier(nullptr);
        }
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < n_threads; ++i) {
        threads.emplace_back(run, i);
    }
    run(0);
    for (auto & thread : threads) {
        thread.join();
    }
    std::sort(rates.begin(), rates.end());
    printf("%.2f\n", rates[rates.size()/2]);
    ggml_free(ctx);
    return 0;
}

int main(int argc, char ** argv) {
    for (int i = 0; i < 1 << 16; ++i) {
        ggml_table_f32_f16[i] = ggml_fp16_to_fp32((ggml_fp16_t) i);
    }
    if (argc == 8) {
        int64_t n[6];
        for (int i = 0; i < 6; ++i) {
            n[i] = atoll(argv[i + 2]);
        }
        const bool tiles = strcmp(argv[1], "tiles") == 0;
        if (tiles && !ggml_cpu_dbf_has_tiles()) {
            printf("these kernels take rows\n");
            return 2;
        }
        return bench(tiles, n[0], n[1], n[2], n[3], (int) n[4], n[5]);
    }

    double worst = 0.0;
    const bool quick = argc > 1;
    const int64_t shapes[][3] = {
        {32, 32, 1}, {64, 32, 3}, {64, 32, 33}, {96, 160, 5}, {544, 96, 333}, {96, 1056, 37}, {8224, 64, 65}, {1056, 480, 77}, {2048, 1056, 131}
    };
    for (const auto & shape : shapes) {
        const int64_t n_in = shape[0], k = shape[1], n_out = shape[2];
        for (ggml_type type_s : { GGML_TYPE_F16, GGML_TYPE_F32 }) {
            for (int64_t n_vec : { 1, 4, 7, 16, 17, 40 }) {
                if (quick && (n_in*k > 1000000 || (n_vec == 40 && n_in > 1000) || ((n_vec == 7 || n_vec == 16 || n_vec == 17) && type_s == GGML_TYPE_F32))) {
                    continue;
                }
                ggml_init_params ip = { (size_t) 64 << 20, nullptr, false };
                ggml_context * ctx = ggml_init(ip);
                ggml_tensor * B  = ggml_new_tensor_2d(ctx, GGML_TYPE_DBF, n_in, k);
                ggml_tensor * A  = ggml_new_tensor_2d(ctx, GGML_TYPE_DBF, k, n_out);
                ggml_tensor * sb = ggml_new_tensor_1d(ctx, type_s, n_in);
                ggml_tensor * sm = ggml_new_tensor_1d(ctx, type_s, k);
                ggml_tensor * sa = ggml_new_tensor_1d(ctx, type_s, n_out);
                ggml_tensor * x  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_in, n_vec);
                for (ggml_tensor * t : { B, A, sb, sm, sa, x }) {
                    fill(t);
                }
                ggml_tensor * op = ggml_dbf_mul_mat(ctx, B, A, sb, sm, sa, x);

                const auto want = compute(op, /*use_ref =*/ true, 1);
                for (int n_threads : { 1, 3, 9 }) {
                    const auto got = compute(op, false, n_threads);
                    double err = 0.0, sum = 0.0;
                    for (size_t i = 0; i < want.size(); ++i) {
                        err += (want[i] - got[i])*(want[i] - got[i]);
                        sum += want[i]*want[i];
                    }
                    // 16 bits are off by 1e-8, sums of four in 14 bits by 1e-7, 8 bits would be by 1e-4; the few outputs of
                    // the small shapes may cancel; NaN fails
                    worst = std::fmax(worst, n_out < 9 ? 0.0 : err/sum);
                    check(err/sum < (n_out < 9 ? 10*BOUND : BOUND), "accuracy", n_in, k, n_out);
                }

#if defined(DBF_TABLES)
                // factors in tiles, both or one of them: the same bits; and back to rows
                if (ggml_cpu_dbf_has_tiles()) {
                    const auto of_rows = compute(op, false, 2);
                    for (const auto & in_tiles : { std::vector<ggml_tensor *>{A, B}, {A}, {B} }) {
                        std::vector<std::vector<char>> rows;
                        for (ggml_tensor * t : in_tiles) {
                            rows.emplace_back((char *) t->data, (char *) t->data + ggml_nbytes(t));
                            ggml_cpu_dbf_set_tiles(t, rows.back().data());
                            const bool same = memcmp(t->data, rows.back().data(), ggml_nbytes(t)) == 0;
                            check(same == (t->ne[1] < dbf_tables::ROWS), "tiles differ from rows", n_in, k, n_out);
                        }
                        check(compute(op, false, 2) == of_rows, "tiles", n_in, k, n_out);
                        check(rows.size() < 2 || compute(op, true, 1) == want, "reference of tiles", n_in, k, n_out);
                        for (size_t i = 0; i < in_tiles.size(); ++i) {
                            std::vector<char> back(rows[i].size());
                            ggml_cpu_dbf_get_rows(in_tiles[i], back.data());
                            check(back == rows[i], "rows of tiles", n_in, k, n_out);
                            memcpy(in_tiles[i]->data, back.data(), back.size());
                            in_tiles[i]->extra = nullptr;
                        }
                    }
                }
#endif

                // the last vector is special, those before it must not notice
                float * last = (float *) x->data + (n_vec - 1)*n_in;
                const std::vector<float> kept(last, last + n_in);
                for (float special : { NAN, INFINITY, -INFINITY }) {
                    last[n_in/2] = special;
                    const auto got = compute(op, false, 2);
                    for (size_t i = 0; i < got.size(); ++i) {
                        check(std::isnan(got[i]) == ((int64_t) i >= (n_vec - 1)*n_out), "not finite", n_in, k, n_out);
                    }
                    last[n_in/2] = kept[n_in/2];
                }
                memset(last, 0, n_in*sizeof(float));
                const auto zero = compute(op, false, 2);
                for (int64_t i = 0; i < n_out; ++i) {
                    check(zero[(n_vec - 1)*n_out + i] == 0.0f, "zero", n_in, k, n_out);
                }
                for (int64_t i = 0; i < n_in; ++i) {
                    last[i] = 1e-42f*kept[i];
                }
                const auto tiny = compute(op, false, 2);
                for (int64_t i = 0; i < n_out; ++i) {
                    check(std::fabs(tiny[(n_vec - 1)*n_out + i]) < 1e-25f, "denormal", n_in, k, n_out);
                }
                // as large as sums can be: every input and every sign alike, in a row of 4096 the bound of the tables' sums
                for (int64_t i = 0; i < n_in; ++i) {
                    last[i] = 1e37f;
                }
                for (ggml_tensor * s : { sb, sm, sa }) {
                    std::vector<float> value(s->ne[0], s == sb ? 1.0f : s == sm ? 6e-8f : 1e-6f);
                    if (s->type == GGML_TYPE_F32) {
                        memcpy(s->data, value.data(), value.size()*sizeof(float));
                    } else {
                        ggml_quantize_chunk(s->type, value.data(), s->data, 0, 1, s->ne[0], nullptr);
                    }
                }
                memset(A->data, 0xff, ggml_nbytes(A));
                memset(B->data, 0xff, ggml_nbytes(B));
                const auto most = compute(op, true, 1);
                const auto all  = compute(op, false, 2);
                for (int64_t i = (n_vec - 1)*n_out; i < n_vec*n_out; ++i) {
                    check(std::fabs(all[i] - most[i]) <= 1e-3f*most[i], "all alike", n_in, k, n_out);
                }
                ggml_free(ctx);
            }
        }
    }
    printf("nmse %.3g\n", worst);
#if defined(DBF_TABLES)
    printf("tiles of %d rows\n", (int) dbf_tables::ROWS);
#endif
    return n_fail == 0 ? 0 : 1;
}
