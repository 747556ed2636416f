/* localvlm_tap.h - reads attention out of llama.cpp graphs, and mends what a graph callback can mend.
 *
 * One lv_tap serves one llama_context or one mtmd_context: pass lv_tap_eval as `cb_eval` and the tap as
 * `cb_eval_user_data` when the context is created.
 *
 * Ownership   The caller owns the tap and every array it passes in; arrays are copied before a call returns.
 *             The tap must outlive the context that it was given to, or at least its last use; a run is ended
 *             (lv_tap_end, lv_tower_end) before its context is freed, because a cancelled run restores flags there.
 * Threads     lv_tap_eval runs on the thread that calls llama_decode or mtmd_encode_chunk. All other calls must
 *             come from that thread or happen between two such calls. Only lv_tap_cancel may come from any thread
 *             at any time.
 * Returns     0 is success, a negative LV_E_* is an error; lv_tap_error() then says what happened. A callback
 *             cannot fail upward: an error inside one disarms the tap, is kept, and is returned by lv_tap_end().
 */
#ifndef LOCALVLM_TAP_H
#define LOCALVLM_TAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define LV_API __attribute__((visibility("default")))
#else
#define LV_API
#endif

#define LV_TAP_ABI 4

enum lv_status {
    LV_OK = 0,
    LV_E_ARG = -1,       /* an argument is out of range */
    LV_E_MEMORY = -2,    /* out of memory */
    LV_E_GRAPH = -3,     /* the graph is not shaped as expected; the message names node and layer */
    LV_E_CHECK = -4,     /* self-check failed: softmax(q k) v does not reproduce a node's output */
    LV_E_CANCELLED = -5, /* lv_tap_cancel was called; results of this run are garbage */
};

/* What the attention of a row is added to. A row may belong to several. */
enum lv_row_class {
    LV_ROW_NONE = 0,
    LV_ROW_PROMPT = 1,    /* text row after the last image token */
    LV_ROW_GENERATED = 2, /* a generated token that was fed back */
    LV_ROW_LAST = 4,      /* the last prompt row, kept apart */
};
#define LV_N_CLASS 3

/* How rows are put together. p is one row's probabilities over the image tokens (N of them, in one layer and head,
 * the softmax taken over ALL cells the row may see). */
enum lv_reduction {
    LV_SUM = 0,      /* sum over rows of p */
    LV_WEIGHTED = 1, /* sum over rows of s p, s = (1 - H(p/|p|) / ln N)^2: a diffuse row counts for little */
    LV_MAX = 2,      /* maximum over rows of p */
};
#define LV_N_REDUCTION 3

typedef struct lv_tap lv_tap;

/* Version guard: compares the headers this file was compiled with to the libraries that are loaded.
 * Returns NULL when they agree, else a static message naming both values. */
LV_API const char *lv_tap_guard(void);
LV_API int lv_tap_abi(void);

LV_API lv_tap *lv_tap_new(void);
LV_API void lv_tap_free(lv_tap *tap);
LV_API const char *lv_tap_error(const lv_tap *tap); /* valid until the next call on this tap */

/* The two functions that llama.cpp calls. user_data is the lv_tap. */
LV_API bool lv_tap_eval(struct ggml_tensor *t, bool ask, void *user_data); /* ggml_backend_sched_eval_callback */
LV_API bool lv_tap_abort(void *user_data);                                /* ggml_abort_callback: true = stop */

/* Cancel: lv_tap_abort answers true from now on, and lv_tap_eval clears GGML_TENSOR_FLAG_COMPUTE of every node it is
 * asked about (restored at lv_tap_end), so that encoders and GPU graphs stop too. The only call that is safe from
 * any thread. */
LV_API void lv_tap_cancel(lv_tap *tap);
LV_API void lv_tap_cancel_reset(lv_tap *tap);
/* Encoders notice a cancel after every block. Text models notice it through lv_tap_abort on the CPU; on: also at every
 * `l_out-*` node of more than 8 rows, for GPUs, at the price of one more synchronisation a layer. Off by default. */
LV_API int lv_tap_cancel_points(lv_tap *tap, bool on);

/* Threads for the recomputation, 1 by default. Give the number the context decodes with: OpenMP keeps one pool, and a
 * region of another size ends threads that the next graph has to start again. */
LV_API int lv_tap_threads(lv_tap *tap, int32_t n_threads);

/* ---- LLM ------------------------------------------------------------------------------------------------------ */

/* Shapes of the text model; must be set before lv_tap_begin. n_image_max bounds the image tokens counted. Allocates
 * nothing yet. */
LV_API int lv_tap_llm(lv_tap *tap, int32_t n_layer, int32_t n_head);

/* Forgets all sums, and says how many image tokens there are (over all tiles and images) and which reductions are
 * wanted (bit i = enum lv_reduction i). The cell map is kept: cells of already prefilled image tokens stay known, but
 * for those with an index >= n_image. Cells that left the KV cache need no care: the mask hides them. */
LV_API int lv_tap_reset(lv_tap *tap, int32_t n_image, uint32_t reductions);
/* Clears the cell map: for when image tokens stay in the KV cache under indices that now mean something else. */
LV_API int lv_tap_forget(lv_tap *tap);

/* Describes the batch that the next llama_decode will run. The batch must fit one micro-batch (n_rows <= n_ubatch)
 * and one sequence. For each row:
 *   image[i]  index of the image token this row is (0 <= index < n_image), or -1 for text: entered in the cell map,
 *             read from the graph's SET_ROWS nodes (one map per KV cache buffer: sliding-window models have two)
 *   rows[i]   lv_row_class bits: which sums this row's attention enters. All LV_ROW_NONE = disarmed: `ask` answers
 *             false everywhere but for the bookkeeping above, and nothing is computed.
 *   pos[i]    position to write into the graph's `inp_pos` input in place of the batch's own (models with one
 *             position per token only), or pos == NULL for none.
 * Attention of rows is recomputed as softmax(scale q k + mask) from the FLASH_ATTN_EXT node's inputs, or read from a
 * `kq_soft_max` node when flash attention is off. */
LV_API int lv_tap_begin(lv_tap *tap, int32_t n_rows, const int32_t *image, const uint8_t *rows, const int32_t *pos);

/* After llama_decode returned: restores flags, reports the first error of the run. Also checks that every layer was
 * seen when rows were armed. */
LV_API int lv_tap_end(lv_tap *tap);

/* Copies one (n_layer, n_head, n_image) float32 block. cls: index 0 prompt, 1 generated, 2 last. size in floats. */
LV_API int lv_tap_read(const lv_tap *tap, int32_t cls, int32_t reduction, float *out, size_t size);
/* Number of rows that entered class cls since the reset. */
LV_API int64_t lv_tap_rows(const lv_tap *tap, int32_t cls);

/* Self-check, to be switched on for one run per model: for one armed row of every attention node, softmax(qk) v is
 * compared to the node's output. lv_tap_end returns LV_E_CHECK, naming the layer, when the largest difference
 * exceeds tolerance (fraction of the row's largest sum of p |v|, which ggml's rounding is in proportion to: it rounds q
 * and sums v in half precision). Over more than 256 cells it is allowed in proportion to them: where attention is even,
 * what is added falls below half a step of what is there. A wrong scale, mask or head is off by far more. Without
 * flash attention the probabilities are read, and only their sum is checked.
 * lv_tap_check_worst: the largest ratio of the last run. */
LV_API int lv_tap_check(lv_tap *tap, bool on, float tolerance);
LV_API float lv_tap_check_worst(const lv_tap *tap);

/* ---- Staged layers --------------------------------------------------------------------------------------------- */

/* Backends skip a node whose GGML_TENSOR_FLAG_COMPUTE is cleared. So several contexts of one model, each with its own
 * tap, share its layers: each runs some of them and leaves out those before and after. What the last layer of one gives
 * is captured and goes on in the next, on fewer rows if wanted. Rows are handed over at the nodes `l_out-<layer>`; what a
 * graph adds to them later (Qwen3-VL's deepstack features) is added where the next layer runs. The flags are restored by
 * lv_tap_end, which must follow llama_decode whatever that returned. What KV caches of layers left out hold is lost: on
 * Linux, their pages go back to the system until they are written again. */

/* Stages the run that lv_tap_begin has just described, and this run alone: of the layers 0..n_layer-1 of lv_tap_llm those
 * from `first` to `end` - 1 run, not all. width: of a hidden row. hidden: (n_rows, width) float32 that layer first - 1
 * gave, copied; NULL where first is 0. keep: the caches of layers below `first` keep what they hold, so that one context
 * may run some layers on rows whose cells it has filled in the layers before, if the rows come to the same cells again.
 * Where end < n_layer the logits are garbage: ask for none. Attention is recorded in the layers that run.
 * lv_tap_end returns LV_E_GRAPH when a cut was not met or has another shape, or when a node above `first` reads a result
 * or a KV cache from below it: everything after that was left out, and the run's results are garbage. */
LV_API int lv_stage(lv_tap *tap, int32_t first, int32_t end, int32_t width, const float *hidden, bool keep);
/* After lv_tap_end, where end < n_layer: copies the (n_rows, width) float32 of layer end - 1. size in floats. */
LV_API int lv_stage_read(const lv_tap *tap, float *out, size_t size);

/* ---- Vision tower ---------------------------------------------------------------------------------------------- */

enum lv_tower_mode {
    LV_TOWER_OFF = 0,
    LV_TOWER_CLS = 1,      /* attention of row cls_row to every patch row */
    LV_TOWER_RECEIVED = 2, /* mean over query rows of the attention each patch row receives */
};

enum lv_repair {
    LV_REPAIR_NONE = 0,
    /* llama.cpp's LLaVA graph appends CLS last but numbers positions and picks rows as if it came first:
     * rewrite `positions` (patch i: i+1, last row: 0) and `patches` (0..N-1). ggml-org/llama.cpp 25814. */
    LV_REPAIR_LLAVA_CLS = 1,
    /* The InternVL graph appends CLS last too, but adds the learned positions in file order, CLS's first: patch i gets
     * row i instead of i + 1. The rows of the weight are rolled for the run, and put back by lv_tower_end. */
    LV_REPAIR_POSITIONS = 2,
    /* The converter of LLaVA's towers knows CLIP's GELUs alone, and files with SigLIP get the quick one for the tanh
     * form: its nodes are made the latter. */
    LV_REPAIR_GELU = 4,
};

/* Describes the next mtmd_encode_chunk. n_layer bounds the layers. cls_row is used by LV_TOWER_CLS alone.
 * layers: n_layer flags, or NULL for all. repairs: lv_repair bits. n_patches: patch rows (excludes CLS). */
LV_API int lv_tower_begin(lv_tap *tap, int32_t n_layer, int32_t n_patches, int32_t cls_row, int mode,
                          const uint8_t *layers, uint32_t repairs);
LV_API int lv_tower_end(lv_tap *tap);

/* Where two contexts have the same tower and their own projectors, its blocks run once: what the last of them gave in
 * the one goes on in the other, which leaves the blocks out (see "Staged layers"). What lies before the first block and
 * behind the last runs in both, inputs that are mended there included, and so the results are equal bit by bit.
 *
 * lv_tower_cut, after lv_tower_begin and for that run alone: the cut is the node `layer_out-<layer>`.
 *   rows == NULL  what it gives is kept, for lv_tower_cut_read.
 *   else          the size floats that it gave in the other context for the same picture, copied. The mode must be
 *                 LV_TOWER_OFF: no block runs whose attention could be read. lv_tower_end returns LV_E_GRAPH when the
 *                 graph cannot be cut there or the node has another size; the run's results are garbage then. */
LV_API int lv_tower_cut(lv_tap *tap, int32_t layer, const float *rows, size_t size);
/* After lv_tower_end, where rows were kept: returns their number of floats and copies at most n. 0: the graph cannot be
 * cut there, since it has no such node, or since a later one reads what an earlier block gave (Qwen3-VL's deepstack). */
LV_API int64_t lv_tower_cut_read(const lv_tap *tap, float *out, size_t n);

/* (n_layer, n_patches) float32 head means, in the tower's own row order; layers not seen are NaN. */
LV_API int lv_tower_read(const lv_tap *tap, float *out, size_t size);
/* The tower's `inv_window_idx` input (Qwen2.5-VL), copied when the graph had one: returns its length (0 = none) and
 * copies at most n values. */
LV_API int64_t lv_tower_window_index(const lv_tap *tap, int32_t *out, size_t n);
/* Which repairs were applied in the last run (lv_repair bits). */
LV_API uint32_t lv_tower_repaired(const lv_tap *tap);

#ifdef __cplusplus
}
#endif
#endif
