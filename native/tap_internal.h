/* tap_internal.h - what the files of the tap share. Nothing here is exported. */
#ifndef LOCALVLM_TAP_INTERNAL_H
#define LOCALVLM_TAP_INTERNAL_H

#include <stdatomic.h>

#include "ggml-backend.h"
#include "kernels.h"
#include "localvlm_tap.h"

#define LV_MAX_LAYERS 1024
#define LV_MAX_HEADS 1024
#define LV_MAX_ROWS (1 << 20)
#define LV_MAX_IMAGE (1 << 22)
#define LV_MAX_THREADS 64
#define LV_MAX_MAPS 32     /* KV caches of one model, on each of 16 devices; sliding-window models have two */
#define LV_MAX_INPUTS 32   /* copies of one input tensor over the splits of a graph */
#define LV_MAX_WIDTH (1 << 20)
#define LV_MAX_WRITTEN 4096 /* keys and values of every layer, and then some */
#define LV_FEW_ROWS 8      /* too few for a cancel to be looked for between layers */
#define LV_ERROR_SIZE 512

enum lv_phase { LV_IDLE = 0, LV_LLM, LV_TOWER };

/* A buffer that only grows. */
struct lv_buf {
    void *data;
    size_t size;
};

/* One KV cache: which image token a cell holds. */
struct lv_map {
    int32_t *image; /* (n) -1 = none */
    int64_t n;
    const struct ggml_tensor *done[LV_MAX_INPUTS]; /* index tensors of this run that were entered already */
    int n_done;
    /* the same, as pairs in cell order; rebuilt when stale */
    struct lv_buf cell, pair_image, flag;
    int64_t n_pairs, n_flag, base;
    bool fresh;
    bool holds; /* any image token */
};

/* One attention mask, converted once per run: (blocks, n_kv, lanes) float32, and each block's range of visible cells. */
struct lv_mask {
    const struct ggml_tensor *key;
    struct lv_buf data, first, end;
    int64_t n_kv;
    int lanes;
};
#define LV_N_MASK 2

struct lv_tower {
    int32_t n_layer, n_patches, cls_row;
    int mode;
    uint8_t layers[LV_MAX_LAYERS]; /* wanted */
    uint8_t seen[LV_MAX_LAYERS];
    uint32_t repairs;
    const struct ggml_tensor *mended[LV_MAX_INPUTS];
    int n_mended;
    bool positions_done, patches_done, window_done;
    struct ggml_tensor *rolled; /* position weight whose rows are rolled at present, NULL = none */
    bool roll_done, gelu_done;
    struct lv_buf table;  /* its bytes as the file has them */
    struct lv_buf out;    /* (n_layer, n_patches) */
    struct lv_buf heads;  /* (n_head, n_patches) of the layer at hand */
    struct lv_buf rows;   /* 0, 1, 2, ...: every row, and every patch as its own cell */
    struct lv_buf window; /* (n_window) int32 */
    int64_t n_window;
};

/* Where the current run of an encoder is cut (lv_tower_cut). */
struct lv_cut {
    char name[24]; /* of the node; empty: not at all */
    bool given;    /* its rows are given, and the blocks left out; else they are kept */
    bool begun;    /* the first node of block 0 was met */
    bool done;     /* rows were given or kept */
    bool open;     /* a later node reads what lies before the cut beside it */
    const struct ggml_tensor *node;
    struct lv_buf rows; /* (n) float32 */
    size_t n;
};

enum lv_place { LV_BELOW = 0, LV_WITHIN, LV_ABOVE };

/* What the current run leaves out (lv_stage). */
struct lv_stage {
    int32_t first, end, width; /* end 0 = nothing */
    bool keep;
    char in[24], out[24];  /* names of the nodes whose rows are given and captured */
    enum lv_place place;   /* of the node that is asked about, against the layers that run */
    bool begun;            /* the first node of layer 0 was met */
    bool given, captured;
    struct lv_buf hidden;  /* (n_rows, width) float32 */
    const struct ggml_tensor *written[LV_MAX_WRITTEN]; /* caches that nodes left out would have written to */
    int n_written;
    const struct ggml_tensor *copies[LV_MAX_INPUTS]; /* of other tensors, for another device: known to be there */
    int n_copies;
};

struct lv_tap {
    char error[LV_ERROR_SIZE];
    int status; /* first error of the current run */
    atomic_int cancelled;
    enum lv_phase phase;
    bool points; /* ask for every l_out-* of many rows too, so that a cancel is noticed there */
    bool copy_always; /* fetch host memory too, as if it were a device: for tests */
    int n_threads;
    const struct lv_kernels *kernels;

    /* LLM: shapes and sums */
    int32_t n_layer, n_head, n_image;
    uint32_t reductions;
    float *sums[LV_N_CLASS][LV_N_REDUCTION]; /* (n_layer, n_head, n_image); NULL = all zero */
    int64_t n_rows_seen[LV_N_CLASS];
    struct lv_map maps[LV_MAX_MAPS];
    int n_maps;
    int8_t map_of_layer[LV_MAX_LAYERS]; /* -1 = unknown */

    /* LLM: the current run */
    int32_t n_rows, n_armed;
    struct lv_buf image, rows, pos, armed; /* int32, uint8, int32; armed: indices of rows with a class */
    bool has_pos;
    uint8_t seen[LV_MAX_LAYERS], stored[LV_MAX_LAYERS];
    int n_seen;
    const struct ggml_tensor *moved[LV_MAX_INPUTS];
    int n_moved;
    struct lv_mask masks[LV_N_MASK];
    int next_mask;

    struct lv_stage stage;

    /* nodes whose flags a cancel, a stage or a cut cleared; those before a cut whose rows are kept */
    struct lv_buf cleared; /* (n_cleared) struct ggml_tensor * */
    size_t n_cleared;

    bool check;
    float tolerance, worst;

    struct lv_tower tower;
    struct lv_cut cut;
    struct lv_buf fetch[6]; /* q, k, v, mask, sinks, output: when they are not in host memory */
    struct lv_buf scratch[LV_MAX_THREADS];
};

/* ---- tap.c ---- */
/* Keeps the first error of a run and returns its code. */
int lv_fail(lv_tap *tap, int code, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;
bool lv_grow(lv_tap *tap, struct lv_buf *buf, size_t size);
/* Host pointer to the first size bytes from t's data on; fetched into buf when t lives on a device. */
const void *lv_host(lv_tap *tap, struct lv_buf *buf, const struct ggml_tensor *t, size_t size);
bool lv_write(lv_tap *tap, struct ggml_tensor *t, const void *data, size_t size);
bool lv_has_name(const struct ggml_tensor *t, const char *name); /* exact, or a scheduler's copy of it */
/* Whether t is a scheduler's copy of a tensor, or of a view of it: "CUDA1#l_out-3 (view)#0". */
bool lv_is_copy_of(const struct ggml_tensor *t, const char *name);
bool lv_starts(const struct ggml_tensor *t, const char *prefix);
int lv_number_after_dash(const char *name); /* "Qcur-3 (view)" -> 3, else -1 */
void lv_parallel(lv_tap *tap, int n, void (*task)(void *ctx, int i, int thread), void *ctx);
/* Adds t to a list of n known tensors: 1 = new, 0 = known, -1 = full. */
int lv_once(const struct ggml_tensor **list, int *n, const struct ggml_tensor *t);
/* Remembers a node that has its flag. False if there is no memory to do so. */
bool lv_note_node(lv_tap *tap, struct ggml_tensor *t);
/* False if there is no memory to remember the node with: it then keeps its flag. */
bool lv_clear_flag(lv_tap *tap, struct ggml_tensor *t);
void lv_restore_flags(lv_tap *tap);
bool lv_is_empty(const struct ggml_tensor *t); /* views and reshapes: no backend computes them */
/* The node whose result t is, through views and reshapes. */
const struct ggml_tensor *lv_computed(const struct ggml_tensor *t);
bool lv_cancel_node(lv_tap *tap, struct ggml_tensor *t, bool ask);

/* ---- cells.c ---- */
void lv_maps_begin(lv_tap *tap);
void lv_maps_drop(lv_tap *tap, int32_t n_image); /* forgets entries >= n_image */
void lv_maps_free(lv_tap *tap);
/* SET_ROWS of a K cache: enters this batch's rows. image == NULL: all text. */
void lv_map_store(lv_tap *tap, const struct ggml_tensor *node, const int32_t *image, int32_t n_rows);
int lv_cache_layer(const struct ggml_tensor *t); /* layer of "cache_k_l3" in t's name or its view's, else -1 */
/* Map for an attention node's keys, with pairs ready for cells base..base+n_kv-1; NULL on error. */
const struct lv_map *lv_map_pairs(lv_tap *tap, int cache_layer, int64_t base, int64_t n_kv);

/* ---- attention.c ---- */
struct lv_attn {
    const struct ggml_tensor *node;
    const char *q, *k, *v, *out;
    size_t q_row, q_head, k_row, k_head, v_row, v_head, out_head, out_row; /* strides in bytes */
    enum ggml_type k_type, v_type;
    ggml_to_float_t k_float, v_float;
    int64_t d, dv, n_q, n_kv, n_head, n_head_kv;
    float scale, softcap, max_bias;
    const float *sinks;          /* (n_head) or NULL */
    const struct lv_mask *mask;  /* blocks of `lanes` selected rows, or NULL */
};

/* Up to `lanes` rows of one head; row i's probability of cell c is e[c lanes + i] w[i], zero outside first..end-1. */
struct lv_block {
    int32_t head, n, lanes;
    const int32_t *rows; /* (n) row numbers in the graph */
    const float *e;
    int64_t first, end;
    float w[LV_LANES];       /* 1 / denominator; 0 for lanes without a row */
    float entropy[LV_LANES]; /* of the image part; only when a flag array was given */
};
typedef void (*lv_emit)(void *ctx, const struct lv_block *block);

int lv_lanes(int64_t n_rows); /* LV_LANES for many rows, 1 for few */
/* Reads shapes, parameters and pointers; need_v also V and the node's output. */
int lv_attn_open(lv_tap *tap, const struct ggml_tensor *node, bool need_v, struct lv_attn *a);
int lv_attn_mask(lv_tap *tap, struct lv_attn *a, const int32_t *rows, int32_t n_rows, bool keep);
int lv_attn_run(lv_tap *tap, const struct lv_attn *a, const int32_t *rows, int32_t n_rows, const float *flag,
                lv_emit emit, void *ctx);
float lv_slope(const struct lv_attn *a, int64_t head);
/* A SOFT_MAX node's rows as blocks of one lane. */
int lv_soft_max_run(lv_tap *tap, const struct ggml_tensor *node, const int32_t *rows, int32_t n_rows,
                    const struct lv_map *map, lv_emit emit, void *ctx);

/* ---- stage.c ---- */
enum lv_step { LV_RUN, LV_SKIP, LV_CUT };
enum lv_step lv_stage_ask(lv_tap *tap, struct ggml_tensor *t);
bool lv_stage_done(lv_tap *tap, struct ggml_tensor *t); /* whether t was a cut */
bool lv_stage_runs(const lv_tap *tap, int layer);       /* false for layers that this run leaves out */
void lv_stage_complete(lv_tap *tap);

/* ---- cut.c ---- */
void lv_cut_begin(lv_tap *tap); /* none */
enum lv_step lv_cut_ask(lv_tap *tap, struct ggml_tensor *t);
bool lv_cut_done(lv_tap *tap, struct ggml_tensor *t); /* whether t was the cut */
void lv_cut_complete(lv_tap *tap);

/* ---- llm.c, tower.c, check.c ---- */
bool lv_llm_ask(lv_tap *tap, struct ggml_tensor *t);
void lv_llm_done(lv_tap *tap, struct ggml_tensor *t);
bool lv_tower_ask(lv_tap *tap, struct ggml_tensor *t);
void lv_tower_done(lv_tap *tap, struct ggml_tensor *t);
int lv_check_node(lv_tap *tap, const struct lv_attn *a, int layer, int32_t row);
int lv_check_soft_max(lv_tap *tap, const struct ggml_tensor *node, int layer, int32_t row);

#endif
