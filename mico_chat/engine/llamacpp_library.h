/* What this project calls of llama.h, mtmd.h, mtmd-helper.h and gguf.h, for llamacpp_library.py. Opaque
   pointers, enums and callbacks are written as void * and int32_t. Both tested releases fit, but for
   moe_cache_size, which the compiled one lacks. */

struct llama_model_params {
    void *devices, *buffers;
    int32_t n_gpu_layers, split_mode, load_mode, lazy_mode, main_gpu;
    void *tensor_split, *progress_callback, *progress_callback_user_data, *kv_overrides;
    bool vocab_only, check_tensors, use_extra_bufts, no_host, no_alloc, load_mtp;
};
struct llama_context_params {
    uint32_t n_ctx, n_batch, n_ubatch, n_seq_max, n_rs_seq, n_outputs_max, n_outputs_max_per_seq;
    int32_t n_threads, n_threads_batch;
    int32_t ctx_type, rope_scaling_type, pooling_type, attention_type, flash_attn_type;
    float rope_freq_base, rope_freq_scale;
    float yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow;
    uint32_t yarn_orig_ctx;
    float defrag_thold;
    void *cb_eval, *cb_eval_user_data;
    int32_t type_k, type_v;
    size_t moe_cache_size;
    void *abort_callback, *abort_callback_data;
    bool embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified;
    void *samplers;
    size_t n_samplers;
    void *ctx_other;
};
struct llama_batch {
    int32_t n_tokens;
    void *token, *embd, *pos, *n_seq_id, *seq_id, *logits;
};
struct llama_token_data_array {
    void *data;
    size_t size;
    int64_t selected;
    bool sorted;
};
struct llama_sampler_chain_params {
    bool no_perf;
};
struct llama_model_quantize_params {
    int32_t nthread, ftype, output_tensor_type, token_embedding_type;
    bool allow_requantize, quantize_output_tensor, only_copy, pure, keep_split, dry_run;
    void *imatrix, *kv_overrides, *tt_overrides, *prune_layers;
    size_t max_buf_size;
};
struct mtmd_context_params {
    bool use_gpu;
    void *device;
    bool print_timings;
    int32_t n_threads;
    void *image_marker, *media_marker;
    int32_t flash_attn_type;
    bool warmup;
    int32_t image_min_tokens, image_max_tokens;
    void *cb_eval, *cb_eval_user_data;
    int32_t batch_max_tokens;
    void *progress_callback, *progress_callback_user_data;
};
struct mtmd_input_text {
    const char *text;
    size_t text_len;
    bool add_special, parse_special;
};
struct mtmd_input_part {
    void *text, *bitmap;
};
struct mtmd_caps {
    bool inp_vision, inp_audio;
};
struct gguf_init_params {
    bool no_alloc;
    void *ctx;
};

void llama_adapter_lora_free(void *);
void *llama_adapter_lora_init(void *, const char *);
void llama_backend_init(void);
llama_context_params llama_context_default_params(void);
int32_t llama_decode(void *, llama_batch);
int32_t llama_detokenize(void *, void *, int32_t, const char *, int32_t, bool, bool);
void llama_free(void *);
float *llama_get_logits_ith(void *, int32_t);
void *llama_get_memory(void *);
void *llama_init_from_model(void *, llama_context_params);
void llama_log_set(void *, void *);
void llama_memory_clear(void *, bool);
void llama_memory_seq_cp(void *, int32_t, int32_t, int32_t, int32_t);
bool llama_memory_seq_rm(void *, int32_t, int32_t, int32_t);
const char *llama_model_chat_template(void *, const char *);
llama_model_params llama_model_default_params(void);
void llama_model_free(void *);
void *llama_model_get_vocab(void *);
bool llama_model_is_hybrid(void *);
bool llama_model_is_recurrent(void *);
void *llama_model_load_from_file(const char *, llama_model_params);
int32_t llama_model_meta_val_str(void *, const char *, const char *, size_t);
int32_t llama_model_n_ctx_train(void *);
int32_t llama_model_n_embd(void *);
int32_t llama_model_n_embd_inp(void *);
int32_t llama_model_n_head(void *);
int32_t llama_model_n_head_kv(void *);
int32_t llama_model_n_layer(void *);
uint32_t llama_model_quantize(const char *, const char *, void *);
llama_model_quantize_params llama_model_quantize_default_params(void);
int32_t llama_model_rope_type(void *);
uint32_t llama_n_ctx(void *);
void llama_sampler_accept(void *, int32_t);
void llama_sampler_apply(void *, void *);
void llama_sampler_chain_add(void *, void *);
llama_sampler_chain_params llama_sampler_chain_default_params(void);
void *llama_sampler_chain_init(llama_sampler_chain_params);
void llama_sampler_free(void *);
void *llama_sampler_init_dist(uint32_t);
void *llama_sampler_init_greedy(void);
void *llama_sampler_init_min_p(float, size_t);
void *llama_sampler_init_penalties(int32_t, int32_t, float, float, float);
void *llama_sampler_init_temp(float);
void *llama_sampler_init_top_k(int32_t);
void *llama_sampler_init_top_p(float, size_t);
int32_t llama_sampler_sample(void *, void *, int32_t);
void llama_set_abort_callback(void *, void *, void *);
int32_t llama_set_adapters_lora(void *, void *, size_t, void *);
void llama_set_causal_attn(void *, bool);
void llama_set_n_threads(void *, int32_t, int32_t);
size_t llama_state_seq_get_size_ext(void *, int32_t, uint32_t);
int32_t llama_token_to_piece(void *, int32_t, const char *, int32_t, int32_t, bool);
int32_t llama_tokenize(void *, const char *, int32_t, void *, int32_t, bool, bool);
int32_t llama_vocab_bos(void *);
int32_t llama_vocab_eos(void *);
bool llama_vocab_get_add_bos(void *);
int32_t llama_vocab_get_attr(void *, int32_t);
const char *llama_vocab_get_text(void *, int32_t);
bool llama_vocab_is_eog(void *, int32_t);
int32_t llama_vocab_n_tokens(void *);
void mtmd_bitmap_free(void *);
void *mtmd_bitmap_init(uint32_t, uint32_t, void *);
void *mtmd_bitmap_init_from_audio(size_t, void *);
void mtmd_bitmap_set_mergeable(void *, bool);
mtmd_context_params mtmd_context_params_default(void);
bool mtmd_decode_use_mrope(void *);
bool mtmd_decode_use_non_causal(void *, void *);
int32_t mtmd_encode_chunk(void *, void *);
void mtmd_free(void *);
int32_t mtmd_get_audio_sample_rate(void *);
mtmd_caps mtmd_get_cap_from_file(const char *);
float *mtmd_get_output_embd(void *);
void mtmd_helper_image_get_decoder_pos(void *, int32_t, void *);
void mtmd_helper_log_set(void *, void *);
void *mtmd_init_from_file(const char *, void *, mtmd_context_params);
int32_t mtmd_input_chunk_get_n_pos(void *);
size_t mtmd_input_chunk_get_n_tokens(void *);
void *mtmd_input_chunk_get_tokens_image(void *);
int32_t *mtmd_input_chunk_get_tokens_text(void *, void *);
int32_t mtmd_input_chunk_get_type(void *);
void mtmd_input_chunks_free(void *);
void *mtmd_input_chunks_get(void *, size_t);
void *mtmd_input_chunks_init(void);
size_t mtmd_input_chunks_size(void *);
bool mtmd_support_vision(void *);
int32_t mtmd_tokenize_from_parts(void *, void *, void *, size_t, bool);
int64_t gguf_find_tensor(void *, const char *);
void gguf_free(void *);
size_t gguf_get_data_offset(void *);
int64_t *gguf_get_tensor_ne(void *, int64_t);
size_t gguf_get_tensor_offset(void *, int64_t);
size_t gguf_get_tensor_size(void *, int64_t);
int32_t gguf_get_tensor_type(void *, int64_t);
void *gguf_init_from_file(const char *, gguf_init_params);
