#pragma once

#include "llama.h"
#include "llama-arch.h"

#include "ggml-cpp.h"

#include <array>
#include <functional>
#include <initializer_list>
#include <map>
#include <string>
#include <utility>
#include <vector>

struct llama_adapter_lora;
struct llama_hparams;
struct llama_model_loader;

//
// Double Binary Factorization (see ggml-dbf.h) in model files: the linear "X.weight" is stored as "X.dbf_b", "X.dbf_a",
// "X.dbf_sb", "X.dbf_sm" and "X.dbf_sa".
//
// The architectures know nothing of this. When one asks for an "X.weight" that is stored this way, it gets a proxy: a tensor
// with the name and the shape of the weight, without data, whose sources are the five. build_lora_mm(), through which the
// architectures build their linears, calls llama_dbf_mul_mat(), which recognizes the proxy.
//
// Linears that read the same input may share their factors: "attn_qkv" holds the rows of q, k and v, "ffn_gate_up" those of
// gate and up, in this order. The architectures ask for attn_qkv by themselves and cut its result into views. They know no
// joint gate and up: both get proxies of some rows, whose products are views of one op.
//

// Checks all that can be checked without the architecture and the data, corrects the number of parameters, sets the file type.
// No-op for a file without DBF tensors. Throws std::runtime_error with the tensor's name and the reason.
void llama_dbf_check_file(llama_model_loader & ml);

// true if the name ends in .dbf_b, .dbf_a, .dbf_sb, .dbf_sm or .dbf_sa
bool llama_dbf_is_companion(const std::string & name);

// an op that uses w (one of the five) in the way that the model will: asked to pick the buffer type of w
ggml_tensor * llama_dbf_probe_op(ggml_context * ctx, ggml_tensor * w);

// w @ cur, w a proxy or any other weight
ggml_tensor * llama_dbf_mul_mat(ggml_context * ctx, ggml_tensor * w, ggml_tensor * cur);

// res = w @ cur, and to its rows of q, k and v added what an adapter has for them, if w is an attn_qkv of joint factors:
// an adapter trained on the model with three linears fits
ggml_tensor * llama_dbf_add_part_loras(
        ggml_context * ctx, ggml_tensor * w, ggml_tensor * cur, llama_adapter_lora & lora, float adapter_scale, ggml_tensor * res);

struct llama_dbf_proxies {
    using create_fn = std::function<ggml_tensor * (const LLM_TN_IMPL &, const std::initializer_list<int64_t> &)>;

    // If tn is stored as DBF: creates the five with create() and returns true, with the proxy (or nullptr if the
    // five were skipped) in result. Throws std::runtime_error if they do not make a weight of shape ne.
    bool create(
            const llama_model_loader & ml,
            const llama_model_params & params,
            const llama_hparams & hparams,
            const LLM_TN_IMPL & tn,
            const std::initializer_list<int64_t> & ne,
            const create_fn & create,
            ggml_tensor *& result);

    // To be called when the data is loaded: makes the proxies visible by name, which LoRA adapters need, and throws
    // std::runtime_error if a scale is not finite.
    void finalize(std::vector<std::pair<std::string, ggml_tensor *>> & tensors_by_name);

private:
    using factors = std::array<ggml_tensor *, 5>; // dbf_b, dbf_a, dbf_sb, dbf_sm, dbf_sa

    ggml_tensor * add_proxy(const std::string & name, const factors & f, int64_t row, int64_t n_rows);

    std::map<std::string, factors> created; // by base name
    std::vector<ggml_tensor *>     proxies;
    std::vector<ggml_context_ptr>  ctxs;
};
