#include "llama-dbf.h"

#include "llama-adapter.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model-loader.h"

#include "ggml-dbf.h"
#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <stdexcept>

static const uint32_t LLAMA_DBF_VERSION = 1;

// in the order of the sources of a proxy
enum { DBF_B, DBF_A, DBF_SB, DBF_SM, DBF_SA, DBF_COUNT };

static const char * const DBF_SUFFIX[DBF_COUNT] = { "dbf_b", "dbf_a", "dbf_sb", "dbf_sm", "dbf_sa" };

// linears whose factors may be joint: the rows of the base are those of its parts, in this order
struct dbf_join {
    const char * base;
    std::vector<const char *> parts;
};
static const dbf_join DBF_JOINS[] = {
    { "attn_qkv",    { "attn_q", "attn_k", "attn_v" } },
    { "ffn_gate_up", { "ffn_gate", "ffn_up" } },
};

[[noreturn]] static void dbf_refuse(const std::string & tensor, const std::string & reason) {
    throw std::runtime_error("DBF tensor '" + tensor + "': " + reason);
}

// name = base + "." + one of the suffixes: returns its index, else -1
static int dbf_split_name(const std::string & name, std::string & base) {
    const size_t dot = name.rfind('.');
    if (dot == std::string::npos) {
        return -1;
    }
    for (int i = 0; i < DBF_COUNT; ++i) {
        if (name.compare(dot + 1, std::string::npos, DBF_SUFFIX[i]) == 0) {
            base = name.substr(0, dot);
            return i;
        }
    }
    return -1;
}

bool llama_dbf_is_companion(const std::string & name) {
    std::string base;
    return dbf_split_name(name, base) >= 0;
}

static void dbf_check_shape(const ggml_tensor * t, int64_t ne0, int64_t ne1, const char * why) {
    if (t->ne[0] != ne0 || t->ne[1] != ne1 || t->ne[2] != 1 || t->ne[3] != 1) {
        dbf_refuse(t->name, format("has shape %s, expected %s (%s)",
            llama_format_tensor_shape(t).c_str(), llama_format_tensor_shape(ne1 == 1 ?
                std::vector<int64_t>{ ne0 } : std::vector<int64_t>{ ne0, ne1 }).c_str(), why));
    }
}

static void dbf_check_version(const gguf_context * meta, const std::string & tensor) {
    const int64_t kid = gguf_find_key(meta, "dbf.version");
    if (kid < 0) {
        dbf_refuse(tensor, "the file has no key dbf.version");
    }
    if (gguf_get_kv_type(meta, kid) != GGUF_TYPE_UINT32) {
        dbf_refuse(tensor, "the key dbf.version is not of type u32");
    }
    const uint32_t version = gguf_get_val_u32(meta, kid);
    if (version != LLAMA_DBF_VERSION) {
        dbf_refuse(tensor, format("the file has dbf.version %u, this build reads version %u", version, LLAMA_DBF_VERSION));
    }
}

void llama_dbf_check_file(llama_model_loader & ml) {
    std::set<std::string> bases;
    for (const auto & [name, w] : ml.weights_map) {
        std::string base;
        const int i = dbf_split_name(name, base);
        if (i >= 0) {
            bases.insert(base);
        }
        if (w.tensor->type == GGML_TYPE_DBF && i != DBF_A && i != DBF_B) {
            dbf_refuse(name, "has type dbf, which only the factors .dbf_a and .dbf_b may have");
        }
    }
    if (bases.empty()) {
        return;
    }

    dbf_check_version(ml.metadata, *bases.begin() + "." + DBF_SUFFIX[DBF_B]);

    for (const auto & base : bases) {
        const ggml_tensor * t[DBF_COUNT];
        for (int i = 0; i < DBF_COUNT; ++i) {
            const std::string name = base + "." + DBF_SUFFIX[i];
            t[i] = ml.get_tensor_meta(name.c_str());
            if (t[i] == nullptr) {
                dbf_refuse(name, "is missing, the others of '" + base + "' are there");
            }
            if (i == DBF_B || i == DBF_A) {
                if (t[i]->type != GGML_TYPE_DBF) {
                    dbf_refuse(name, format("has type %s, expected dbf", ggml_type_name(t[i]->type)));
                }
            } else if (t[i]->type != GGML_TYPE_F16 && t[i]->type != GGML_TYPE_F32) {
                dbf_refuse(name, format("has type %s, expected f16 or f32", ggml_type_name(t[i]->type)));
            }
        }
        if (ml.get_tensor_meta((base + ".weight").c_str()) != nullptr) {
            dbf_refuse(base + "." + DBF_SUFFIX[DBF_B], "the file also has '" + base + ".weight'");
        }
        const size_t dot = base.rfind('.') + 1;
        for (const auto & join : DBF_JOINS) {
            if (base.compare(dot, std::string::npos, join.base) != 0) {
                continue;
            }
            for (const char * kind : join.parts) {
                const std::string part = base.substr(0, dot) + kind;
                if (bases.count(part) > 0 || ml.get_tensor_meta((part + ".weight").c_str()) != nullptr) {
                    dbf_refuse(base + "." + DBF_SUFFIX[DBF_B], "the file also has '" + part + "', whose rows are in it");
                }
            }
        }

        const int64_t n_in  = t[DBF_B]->ne[0];
        const int64_t k     = t[DBF_B]->ne[1];
        const int64_t n_out = t[DBF_A]->ne[1];
        dbf_check_shape(t[DBF_B],  n_in, k,     "a matrix");
        dbf_check_shape(t[DBF_A],  k,    n_out, "as many columns as .dbf_b has rows");
        dbf_check_shape(t[DBF_SB], n_in, 1,     "one scale for each column of .dbf_b");
        dbf_check_shape(t[DBF_SM], k,    1,     "one scale for each row of .dbf_b");
        dbf_check_shape(t[DBF_SA], n_out, 1,    "one scale for each row of .dbf_a");

        // the size of a model is that of its weights, not the number of signs
        for (const ggml_tensor * c : t) {
            ml.n_elements -= ggml_nelements(c);
        }
        ml.n_elements += n_in*n_out;
    }

    ml.ftype = LLAMA_FTYPE_MOSTLY_DBF;
}

ggml_tensor * llama_dbf_probe_op(ggml_context * ctx, ggml_tensor * w) {
    // w stands where any length is allowed: a factor as A, a scale as sa
    const bool is_factor = w->type == GGML_TYPE_DBF;

    const int64_t n_in  = QK_DBF;
    const int64_t k     = is_factor ? w->ne[0] : QK_DBF;
    const int64_t n_out = is_factor ? w->ne[1] : w->ne[0];

    ggml_tensor * B  = ggml_new_tensor_2d(ctx, GGML_TYPE_DBF, n_in, k);
    ggml_tensor * A  = is_factor ? w : ggml_new_tensor_2d(ctx, GGML_TYPE_DBF, k, n_out);
    ggml_tensor * sb = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_in);
    ggml_tensor * sm = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, k);
    ggml_tensor * sa = is_factor ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_out) : w;
    ggml_tensor * x  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_in, 512);

    return ggml_dbf_mul_mat(ctx, B, A, sb, sm, sa, x);
}

ggml_tensor * llama_dbf_mul_mat(ggml_context * ctx, ggml_tensor * w, ggml_tensor * cur) {
    // no other weight has a source of this type
    if (w->src[DBF_B] == nullptr || w->src[DBF_B]->type != GGML_TYPE_DBF) {
        return ggml_mul_mat(ctx, w, cur);
    }
    ggml_tensor * A = w->src[DBF_A];

    ggml_tensor * joint = nullptr;
    if (w->ne[1] < A->ne[1]) {
        // Has another part been multiplied with this input? What reads an input lies behind it in its context. Looking there
        // needs no memory between graphs, which would have to be right in every thread and for every context.
        const char * begin = (const char *) ggml_get_mem_buffer(ctx);
        const bool   is_in = (const char *) cur >= begin && (const char *) cur < begin + ggml_get_mem_size(ctx);
        for (ggml_tensor * t = is_in ? cur : ggml_get_first_tensor(ctx); t && !joint; t = ggml_get_next_tensor(ctx, t)) {
            if (t->op == GGML_OP_DBF_MUL_MAT && t->src[0] == A && t->src[1] == cur) {
                joint = t;
            }
        }
    }
    if (joint == nullptr) {
        joint = ggml_dbf_mul_mat(ctx, w->src[DBF_B], A, w->src[DBF_SB], w->src[DBF_SM], w->src[DBF_SA], cur);
    }
    if (w->ne[1] == A->ne[1]) {
        return joint;
    }
    return ggml_view_4d(ctx, joint, w->ne[1], joint->ne[1], joint->ne[2], joint->ne[3],
            joint->nb[1], joint->nb[2], joint->nb[3], w->op_params[0]*joint->nb[0]);
}

ggml_tensor * llama_dbf_add_part_loras(
        ggml_context * ctx, ggml_tensor * w, ggml_tensor * cur, llama_adapter_lora & lora, float adapter_scale, ggml_tensor * res) {
    if (w->src[DBF_B] == nullptr || w->src[DBF_B]->type != GGML_TYPE_DBF) {
        return res;
    }
    for (int i = DBF_COUNT; i < GGML_MAX_SRC && w->src[i] != nullptr; ++i) {
        const ggml_tensor * part = w->src[i];
        llama_adapter_lora_weight * lw = lora.get_weight(w->src[i]);
        if (lw == nullptr) {
            continue;
        }
        ggml_tensor * delta = ggml_mul_mat(ctx, lw->b, ggml_mul_mat(ctx, lw->a, cur));
        delta = ggml_scale(ctx, delta, lw->get_scale(lora.alpha, adapter_scale));
        res = ggml_acc(ctx, res, delta, res->nb[1], res->nb[2], res->nb[3], part->op_params[0]*res->nb[0]);
    }
    return res;
}

bool llama_dbf_proxies::create(
        const llama_model_loader & ml,
        const llama_model_params & params,
        const llama_hparams & hparams,
        const LLM_TN_IMPL & tn,
        const std::initializer_list<int64_t> & ne,
        const create_fn & create,
        ggml_tensor *& result) {
    result = nullptr;
    if (tn.suffix == nullptr || strcmp(tn.suffix, "weight") != 0) {
        return false;
    }

    const auto has_factors = [&](llm_tensor t) {
        return ml.get_tensor_meta(LLM_TN_IMPL(tn.arch, t, DBF_SUFFIX[DBF_A], tn.bid, tn.xid).str().c_str()) != nullptr;
    };
    llm_tensor stored = tn.tensor; // the linear whose factors the file has
    int        n_parts = 1;
    if (!has_factors(stored) && (tn.tensor == LLM_TENSOR_FFN_GATE || tn.tensor == LLM_TENSOR_FFN_UP)) {
        stored  = LLM_TENSOR_FFN_GATE_UP;
        n_parts = 2;
    }
    if (!has_factors(stored)) {
        return false;
    }

    const auto sub = [&](int i) {
        return LLM_TN_IMPL(tn.arch, stored, DBF_SUFFIX[i], tn.bid, tn.xid);
    };
    const ggml_tensor * B = ml.get_tensor_meta(sub(DBF_B).str().c_str());
    const ggml_tensor * A = ml.get_tensor_meta(sub(DBF_A).str().c_str());

    if (ne.size() != 2 || llm_tensor_info_for(tn.tensor).op != GGML_OP_MUL_MAT) {
        dbf_refuse(A->name, "'" + tn.str() + "' is not a plain linear layer in this architecture");
    }
    if (params.split_mode == LLAMA_SPLIT_MODE_TENSOR) {
        // the two products would need a reduction in between, which the split states of ggml-backend-meta cannot express
        dbf_refuse(A->name, "split mode 'tensor' is not supported, use 'layer'");
    }

    const int64_t n_in   = ne.begin()[0];
    const int64_t n_rows = ne.begin()[1];
    const int64_t n_out  = n_rows*n_parts;
    const int64_t k      = B->ne[1];
    dbf_check_shape(B, n_in, k,     "the architecture's n_in");
    dbf_check_shape(A, k,    n_out, "the architecture's n_out");

    // once for all parts: a tensor of the file is created once
    const auto [it, is_new] = created.emplace(LLM_TN_IMPL(tn.arch, stored, nullptr, tn.bid, tn.xid).str(), factors());
    factors & f = it->second;
    if (is_new) {
        f = {
            create(sub(DBF_B),  { n_in, k }),
            create(sub(DBF_A),  { k, n_out }),
            create(sub(DBF_SB), { n_in }),
            create(sub(DBF_SM), { k }),
            create(sub(DBF_SA), { n_out }),
        };
    }
    if (std::find(f.begin(), f.end(), nullptr) != f.end()) { // TENSOR_SKIP: counted as seen, not loaded
        return true;
    }

    result = add_proxy(tn.str(), f, tn.tensor == LLM_TENSOR_FFN_UP ? n_out - n_rows : 0, n_rows);

    if (stored == LLM_TENSOR_ATTN_QKV) {
        // q, k and v by their names, for adapters
        const int64_t n_k = hparams.n_embd_k_gqa(tn.bid);
        const int64_t n_v = hparams.n_embd_v_gqa(tn.bid);
        const int64_t n_q = (int64_t) hparams.n_head(tn.bid)*hparams.n_embd_head_k(tn.bid);
        if (n_q + n_k + n_v == n_out) {
            int64_t row = 0;
            int i = DBF_COUNT;
            for (const auto & [part, n] : { std::pair(LLM_TENSOR_ATTN_Q, n_q), std::pair(LLM_TENSOR_ATTN_K, n_k), std::pair(LLM_TENSOR_ATTN_V, n_v) }) {
                result->src[i++] = add_proxy(LLM_TN_IMPL(tn.arch, part, tn.suffix, tn.bid, tn.xid).str(), f, row, n);
                row += n;
            }
        }
    }
    return true;
}

ggml_tensor * llama_dbf_proxies::add_proxy(const std::string & name, const factors & f, int64_t row, int64_t n_rows) {
    ggml_init_params ctx_params = {
        /*.mem_size   =*/ ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ctxs.emplace_back(ggml_init(ctx_params));
    if (!ctxs.back()) {
        throw std::runtime_error("failed to create ggml context");
    }

    ggml_tensor * proxy = ggml_new_tensor_2d(ctxs.back().get(), GGML_TYPE_F32, f[DBF_B]->ne[0], n_rows);
    ggml_set_name(proxy, name.c_str());
    std::copy(f.begin(), f.end(), proxy->src);
    proxy->op_params[0] = (int32_t) row; // its first row in A
    // Poison: an architecture that bypasses build_lora_mm() must fail an assertion instead of computing with nothing.
    // ne[3] stops ggml_mul_mat() and ggml_get_rows(), the empty strides stop views. Nobody else reads them.
    proxy->ne[3] = 2;
    std::fill(proxy->nb, proxy->nb + GGML_MAX_DIMS, 0);

    proxies.push_back(proxy);
    return proxy;
}

static void dbf_check_finite(const ggml_tensor * s) {
    const int64_t n = ggml_nelements(s);

    std::vector<uint8_t> raw(ggml_nbytes(s));
    ggml_backend_tensor_get(s, raw.data(), 0, raw.size());

    std::vector<float> v(n);
    if (s->type == GGML_TYPE_F16) {
        ggml_fp16_to_fp32_row((const ggml_fp16_t *) raw.data(), v.data(), n);
    } else {
        memcpy(v.data(), raw.data(), raw.size());
    }
    for (int64_t i = 0; i < n; ++i) {
        if (!std::isfinite(v[i])) {
            dbf_refuse(s->name, format("scale %lld is not finite", (long long) i));
        }
    }
}

void llama_dbf_proxies::finalize(std::vector<std::pair<std::string, ggml_tensor *>> & tensors_by_name) {
    for (const auto & [base, f] : created) {
        for (int i : { DBF_SB, DBF_SM, DBF_SA }) {
            if (f[i] != nullptr) {
                dbf_check_finite(f[i]);
            }
        }
    }
    for (ggml_tensor * proxy : proxies) {
        proxy->buffer = proxy->src[DBF_A]->buffer; // tells a LoRA adapter where to put its own factors
        tensors_by_name.emplace_back(proxy->name, proxy);
    }
}
