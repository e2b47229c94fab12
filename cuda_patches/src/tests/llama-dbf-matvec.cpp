// Time of one linear on any backend: DBF, any other weight type, cuBLAS, and the memory bandwidth to compare them with.
//
//   llama-dbf-matvec --list
//   llama-dbf-matvec --backend CUDA0 --bandwidth --case dbf:4096:4096:2048 --case q2_k:4096:4096 --case cublas:4096:4096
//
// Writes one JSON object per line. bench/gpu.py makes its tables from them.
//
// A linear is timed as it runs in a model: its weights come from memory, and many launches follow one another. So one
// graph holds many ops on different weights, which together are larger than any L2 cache, and is computed again and again;
// the CUDA backend then replays it as one CUDA graph. The time of a computation, divided by the number of its ops, is one
// sample, and a case's time is the median of its samples. The few microseconds that starting the graph and waiting for its
// end take are part of it, spread over the ops.

#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-dbf.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

static const int     N_WARMUP    = 3;       // the CUDA backend captures its graph in the second computation
static const int64_t MAX_WEIGHTS = 1024;    // of one graph: tiny shapes would need millions to fill the memory wanted
static const int64_t PATTERN     = 1 << 15; // quantizing is slow: the rows repeat after about so many values

struct options {
    std::string backend = "CPU";
    std::vector<std::string> cases;
    int64_t tokens     = 1;
    int64_t rotate_mib = 512; // four times the L2 cache of an B200, five times that of an RTX 5090
    int64_t ops        = 64;
    int64_t reps       = 30;
    int64_t threads    = 0;
    bool    bandwidth  = false;
    bool    list       = false;
};

struct ctx_deleter     { void operator()(ggml_context          * c) const { ggml_free(c); } };
struct buffer_deleter  { void operator()(ggml_backend_buffer_t   b) const { ggml_backend_buffer_free(b); } };
struct backend_deleter { void operator()(ggml_backend_t          b) const { ggml_backend_free(b); } };

using ctx_ptr     = std::unique_ptr<ggml_context, ctx_deleter>;
using buffer_ptr  = std::unique_ptr<ggml_backend_buffer, buffer_deleter>;
using backend_ptr = std::unique_ptr<ggml_backend, backend_deleter>;

[[noreturn]] static void fail(const std::string & message) {
    fprintf(stderr, "llama-dbf-matvec: %s\n", message.c_str());
    exit(1);
}

static void usage(FILE * f) {
    fprintf(f,
        "usage: llama-dbf-matvec [options]\n"
        "\n"
        "  --list              the devices there are, and nothing else\n"
        "  --backend NAME      where to compute, a name from --list (default: CPU)\n"
        "                      (the CPU reads factors in rows here, and not in tiles, into which a model's loader may put them)\n"
        "  --case TYPE:N_IN:N_OUT[:K]\n"
        "                      a linear to time, may be given repeatedly. TYPE is dbf (with K middle channels), a ggml type\n"
        "                      (f16, q2_k, iq2_xxs ...) or cublas, which is f16 with an f16 input: the CUDA backend then\n"
        "                      takes cuBLAS, and one more kernel turns its f16 result into f32\n"
        "  --bandwidth         time a copy and a sum of rows that are larger than the caches\n"
        "  --tokens N          columns of the input (default: 1)\n"
        "  --rotate-mib N      how much memory the different weights of a graph fill (default: 512)\n"
        "  --ops N             ops in a graph, at least (default: 64)\n"
        "  --reps N            samples (default: 30)\n"
        "  --threads N         of the CPU backend\n"
        "\n"
        "example: llama-dbf-matvec --backend CUDA0 --bandwidth --case dbf:4096:4096:2048 --case q2_k:4096:4096\n");
}

static int64_t parse_number(const std::string & text, const std::string & what) {
    char * end = nullptr;
    const long long value = strtoll(text.c_str(), &end, 10);
    if (text.empty() || *end != '\0' || value < 1) {
        fail(what + " '" + text + "' is no positive number");
    }
    return value;
}

static options parse_options(int argc, char ** argv) {
    options o;
    for (int i = 1; i < argc; ++i) {
        const std::string name = argv[i];
        if (name == "--list") {
            o.list = true;
        } else if (name == "--bandwidth") {
            o.bandwidth = true;
        } else if (name == "--help" || name == "-h") {
            usage(stdout);
            exit(0);
        } else {
            int64_t * number =
                name == "--tokens"     ? &o.tokens     :
                name == "--rotate-mib" ? &o.rotate_mib :
                name == "--ops"        ? &o.ops        :
                name == "--reps"       ? &o.reps       :
                name == "--threads"    ? &o.threads    : nullptr;
            if (number == nullptr && name != "--backend" && name != "--case") {
                usage(stderr);
                fail("unknown option " + name);
            }
            if (++i == argc) {
                fail(name + " needs a value");
            }
            if (number != nullptr) {
                *number = parse_number(argv[i], name);
            } else if (name == "--backend") {
                o.backend = argv[i];
            } else {
                o.cases.push_back(argv[i]);
            }
        }
    }
    return o;
}

static std::string json_string(const std::string & text) {
    std::string result = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            result += '\\';
        }
        if ((unsigned char) c >= 0x20) {
            result += c;
        }
    }
    return result + "\"";
}

static void print_device(ggml_backend_dev_t dev) {
    size_t free  = 0;
    size_t total = 0;
    ggml_backend_dev_memory(dev, &free, &total);
    printf("{\"device\": %s, \"description\": %s, \"gpu\": %s, \"memory\": %zu}\n",
        json_string(ggml_backend_dev_name(dev)).c_str(), json_string(ggml_backend_dev_description(dev)).c_str(),
        ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU ? "false" : "true", total);
    fflush(stdout);
}

// what one case multiplies by
struct linear {
    std::string name;
    bool        is_dbf = false;
    ggml_type   type   = GGML_TYPE_F16;
    ggml_type   type_x = GGML_TYPE_F32;
    int64_t     n_in   = 0;
    int64_t     n_out  = 0;
    int64_t     k      = 0;
};

static std::string lower_case(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return (char) std::tolower(c); });
    return text;
}

static ggml_type find_type(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const ggml_type type = (ggml_type) i;
        if (type != GGML_TYPE_DBF && ggml_blck_size(type) > 0 && name == lower_case(ggml_type_name(type))) {
            return type;
        }
    }
    fail("unknown type '" + name + "'");
}

static linear parse_case(const std::string & text) {
    std::vector<std::string> parts;
    for (size_t at = 0; at <= text.size();) {
        const size_t end = std::min(text.find(':', at), text.size());
        parts.push_back(text.substr(at, end - at));
        at = end + 1;
    }
    linear l;
    l.name   = lower_case(parts[0]);
    l.is_dbf = l.name == "dbf";
    if (parts.size() != (l.is_dbf ? 4 : 3)) {
        fail("case '" + text + "' is not TYPE:N_IN:N_OUT, or dbf:N_IN:N_OUT:K");
    }
    l.n_in  = parse_number(parts[1], "n_in");
    l.n_out = parse_number(parts[2], "n_out");
    if (l.is_dbf) {
        l.type = GGML_TYPE_DBF;
        l.k    = parse_number(parts[3], "k");
    } else if (l.name == "cublas") {
        l.type_x = GGML_TYPE_F16;
    } else {
        l.type = find_type(l.name);
    }
    if (l.n_in % ggml_blck_size(l.type) != 0 || l.k % ggml_blck_size(l.type) != 0) {
        fail("case '" + text + "': rows of " + l.name + " are multiples of " + std::to_string(ggml_blck_size(l.type)));
    }
    return l;
}

static std::vector<ggml_tensor *> new_weights(ggml_context * ctx, const linear & l) {
    if (!l.is_dbf) {
        return { ggml_new_tensor_2d(ctx, l.type, l.n_in, l.n_out) };
    }
    return {
        ggml_new_tensor_2d(ctx, GGML_TYPE_DBF, l.n_in, l.k),
        ggml_new_tensor_2d(ctx, GGML_TYPE_DBF, l.k, l.n_out),
        ggml_new_tensor_1d(ctx, GGML_TYPE_F16, l.n_in),
        ggml_new_tensor_1d(ctx, GGML_TYPE_F16, l.k),
        ggml_new_tensor_1d(ctx, GGML_TYPE_F16, l.n_out),
    };
}

static ggml_tensor * new_op(ggml_context * ctx, const linear & l, const std::vector<ggml_tensor *> & w, ggml_tensor * x) {
    return l.is_dbf ? ggml_dbf_mul_mat(ctx, w[0], w[1], w[2], w[3], w[4], x) : ggml_mul_mat(ctx, w[0], x);
}

// Random values of a tensor. Signs are random throughout: how much power a GPU draws, and so its clock, depends on the data.
static std::vector<uint8_t> random_data(const ggml_tensor * t, std::mt19937_64 & rng) {
    std::vector<uint8_t> data(ggml_nbytes(t));
    if (t->type == GGML_TYPE_DBF) {
        for (size_t i = 0; i < data.size(); i += sizeof(uint32_t)) {
            const uint32_t word = (uint32_t) rng();
            memcpy(data.data() + i, &word, sizeof(word));
        }
        return data;
    }
    std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt((float) t->ne[0]));
    const int64_t rows = std::min(ggml_nrows(t), std::max<int64_t>(PATTERN/t->ne[0], 1));
    std::vector<float> values(rows*t->ne[0]);
    for (float & v : values) {
        v = normal(rng);
    }
    const std::vector<float> importance(t->ne[0], 1.0f);
    size_t n = values.size()*sizeof(float);
    if (t->type == GGML_TYPE_F32) {
        memcpy(data.data(), values.data(), n);
    } else {
        n = ggml_quantize_chunk(t->type, values.data(), data.data(), 0, rows, t->ne[0], importance.data());
    }
    for (size_t at = n; at < data.size(); at += n) {
        memcpy(data.data() + at, data.data(), std::min(n, data.size() - at));
    }
    return data;
}

static buffer_ptr allocate(ggml_context * ctx, ggml_backend_t backend, ggml_backend_buffer_usage use) {
    buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx, backend));
    if (!buffer) {
        fail("not enough memory on the device");
    }
    ggml_backend_buffer_set_usage(buffer.get(), use);
    return buffer;
}

static ctx_ptr new_context(int64_t n_tensors, int64_t n_graph = 0) {
    ggml_init_params params = {
        /*.mem_size   =*/ n_tensors*ggml_tensor_overhead() + (n_graph > 0 ? ggml_graph_overhead_custom(n_graph, false) : 0),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    return ctx_ptr(ggml_init(params));
}

struct samples {
    double median = 0; // microseconds of one op
    double least  = 0;
    double most   = 0;
};

static samples time_graph(ggml_backend_t backend, ggml_cgraph * graph, int64_t n_ops, int64_t reps) {
    std::vector<double> us;
    for (int64_t i = -N_WARMUP; i < reps; ++i) {
        const int64_t start = ggml_time_us();
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) { // waits for the end
            fail("the backend could not compute the graph");
        }
        if (i >= 0) {
            us.push_back((double) (ggml_time_us() - start)/n_ops);
        }
    }
    std::sort(us.begin(), us.end());
    return { 0.5*(us[(us.size() - 1)/2] + us[us.size()/2]), us.front(), us.back() };
}

static void time_case(ggml_backend_t backend, const linear & l, const options & o) {
    int64_t one = 0; // bytes
    {
        ctx_ptr ctx = new_context(8);
        for (const ggml_tensor * t : new_weights(ctx.get(), l)) {
            one += ggml_nbytes(t);
        }
    }
    const int64_t wanted    = ((o.rotate_mib << 20) + one - 1)/one;
    const int64_t n_weights = std::min(std::max<int64_t>(wanted, 2), MAX_WEIGHTS);
    const int64_t n_ops     = (o.ops + n_weights - 1)/n_weights*n_weights; // the same number for each

    printf("{\"case\": \"matvec\", \"type\": %s, \"n_in\": %lld, \"n_out\": %lld, \"k\": %lld, \"tokens\": %lld, \"bytes\": %lld, ",
        json_string(l.name).c_str(), (long long) l.n_in, (long long) l.n_out, (long long) l.k, (long long) o.tokens, (long long) one);

    std::mt19937_64 rng(0);
    ctx_ptr ctx_w = new_context(5*n_weights + 1);
    std::vector<std::vector<ggml_tensor *>> weights;
    for (int64_t i = 0; i < n_weights; ++i) {
        weights.push_back(new_weights(ctx_w.get(), l));
    }
    ggml_tensor * x = ggml_new_tensor_2d(ctx_w.get(), l.type_x, l.n_in, o.tokens);

    ctx_ptr ctx = new_context(n_ops, 8*n_ops);
    ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), 8*n_ops, false);
    std::vector<ggml_tensor *> nodes;
    for (int64_t i = 0; i < n_ops; ++i) {
        nodes.push_back(new_op(ctx.get(), l, weights[i % n_weights], x));
        ggml_build_forward_expand(graph, nodes.back());
    }
    if (!ggml_backend_supports_op(backend, nodes[0])) {
        printf("\"supported\": false}\n");
        fflush(stdout);
        return;
    }

    const buffer_ptr buffer_w = allocate(ctx_w.get(), backend, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    for (size_t part = 0; part < weights[0].size(); ++part) {
        const std::vector<uint8_t> data = random_data(weights[0][part], rng);
        for (const auto & w : weights) {
            ggml_backend_tensor_set(w[part], data.data(), 0, data.size());
        }
    }
    const std::vector<uint8_t> data_x = random_data(x, rng);
    ggml_backend_tensor_set(x, data_x.data(), 0, data_x.size());

    // All ops write to one place. Nobody reads the results, and 512 tokens' worth of each op would fill the memory.
    const ggml_backend_buffer_type_t buft = ggml_backend_get_default_buffer_type(backend);
    const buffer_ptr buffer_y(ggml_backend_buft_alloc_buffer(buft, ggml_backend_buft_get_alloc_size(buft, nodes[0])));
    if (!buffer_y) {
        fail("not enough memory on the device");
    }
    for (ggml_tensor * node : nodes) {
        ggml_backend_tensor_alloc(buffer_y.get(), node, ggml_backend_buffer_get_base(buffer_y.get()));
    }

    const samples s = time_graph(backend, graph, n_ops, o.reps);

    float y = NAN;
    ggml_backend_tensor_get(nodes.back(), &y, 0, sizeof(y));
    if (!std::isfinite(y)) {
        fail("the result of " + l.name + " is not finite");
    }
    printf("\"supported\": true, \"us\": %.3f, \"us_least\": %.3f, \"us_most\": %.3f, \"ops\": %lld, \"weights\": %lld}\n",
        s.median, s.least, s.most, (long long) n_ops, (long long) n_weights);
    fflush(stdout);
}

// Read and copy as fast as the backend's own plain kernels can: what a kernel that only streams its weights may hope for.
static void time_bandwidth(ggml_backend_t backend, const options & o) {
    const int64_t n_cols = 4096;
    const int64_t n_rows = std::max<int64_t>((o.rotate_mib << 20)/(n_cols*sizeof(float)), 1);
    const int64_t n_ops  = 4;

    for (const bool copy : { false, true }) {
        ctx_ptr ctx = new_context(2*n_ops + 2, 8*n_ops);
        ggml_tensor * source = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_cols, n_rows);
        ggml_tensor * target = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_cols, n_rows);
        ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), 8*n_ops, false);
        for (int64_t i = 0; i < n_ops; ++i) {
            ggml_build_forward_expand(graph, copy ? ggml_cpy(ctx.get(), source, target) : ggml_sum_rows(ctx.get(), source));
        }
        const buffer_ptr buffer = allocate(ctx.get(), backend, GGML_BACKEND_BUFFER_USAGE_ANY);
        ggml_backend_buffer_clear(buffer.get(), 0);
        const samples s = time_graph(backend, graph, n_ops, o.reps);
        const double bytes = (double) ggml_nbytes(source)*(copy ? 2 : 1);
        printf("{\"case\": \"bandwidth\", \"kind\": \"%s\", \"bytes\": %.0f, \"us\": %.3f, \"gb_per_s\": %.2f}\n",
            copy ? "copy" : "read", bytes, s.median, bytes/s.median*1e-3);
        fflush(stdout);
    }
}

int main(int argc, char ** argv) {
    const options o = parse_options(argc, argv);
    std::vector<linear> linears;
    for (const std::string & text : o.cases) {
        linears.push_back(parse_case(text));
    }

    ggml_time_init();
    ggml_backend_load_all();
    if (o.list) {
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            print_device(ggml_backend_dev_get(i));
        }
        return 0;
    }
    if (linears.empty() && !o.bandwidth) {
        usage(stderr);
        fail("nothing to do: give --case, --bandwidth or --list");
    }

    ggml_backend_dev_t dev = ggml_backend_dev_by_name(o.backend.c_str());
    if (dev == nullptr) {
        fail("there is no device " + o.backend + ": see --list");
    }
    const backend_ptr backend(ggml_backend_dev_init(dev, nullptr));
    if (!backend) {
        fail("the device " + o.backend + " cannot be used");
    }
    if (o.threads > 0) {
        const auto set_n_threads = (ggml_backend_set_n_threads_t)
            ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "ggml_backend_set_n_threads");
        if (set_n_threads != nullptr) {
            set_n_threads(backend.get(), o.threads);
        }
    }

    print_device(dev);
    if (o.bandwidth) {
        time_bandwidth(backend.get(), o);
    }
    for (const linear & l : linears) {
        time_case(backend.get(), l, o);
    }
    ggml_quantize_free();
    return 0;
}
