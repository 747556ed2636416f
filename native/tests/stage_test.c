/* stage_test.c - layers in two contexts: a chain of layers run whole, and run as front and tail on fewer rows. */
#include <stdlib.h>
#include <string.h>

#include "fixture.h"
#include "ggml-cpu.h"

#define WIDTH 32
#define LAYERS 4
#define ROWS 9
#define CELLS 512 /* of a cache: 64 KiB, so that it has whole pages */

enum defect { SOUND = 0, READS_BELOW, SHARES_CACHE, NO_CUT, TWO_CUTS };

static float weights[LAYERS][WIDTH * WIDTH];

struct chain {
    ggml_backend_t backend;
    ggml_backend_sched_t sched;
    ggml_backend_buffer_t buffer;
    struct ggml_context *memory, *ctx;
    struct ggml_cgraph *graph;
    struct ggml_tensor *weight[LAYERS], *cache[LAYERS], *in, *index, *out;
    int n;
};

static void fill(float *data, size_t n) {
    for (size_t i = 0; i < n; i++) {
        data[i] = random_unit();
    }
}

/* norm, a write to the cache, a product, the sum: every row for itself, so a tail's rows are those of the whole. */
static struct ggml_tensor *layer(struct chain *c, struct ggml_tensor *x, int il, enum defect defect,
                                 struct ggml_tensor *below) {
    struct ggml_tensor *norm = ggml_rms_norm(c->ctx, x, 1e-5f);
    ggml_format_name(norm, "norm-%d", il);
    ggml_build_forward_expand(c->graph, ggml_set_rows(c->ctx, c->cache[il], norm, c->index));
    if (defect == READS_BELOW && il == 2) {
        norm = ggml_add(c->ctx, norm, ggml_reshape_2d(c->ctx, below, WIDTH, c->n));
    }
    struct ggml_tensor *cached = c->cache[defect == SHARES_CACHE && il == 3 ? 0 : il];
    struct ggml_tensor *mixed = ggml_mul_mat(c->ctx, c->weight[il], norm);
    mixed = ggml_add(c->ctx, mixed, ggml_view_2d(c->ctx, cached, WIDTH, c->n, cached->nb[1], 0));
    struct ggml_tensor *sum = ggml_add(c->ctx, x, mixed);
    if (defect != NO_CUT || il != 1) {
        ggml_format_name(sum, "l_out-%d", defect == TWO_CUTS && il == 2 ? 1 : il);
    }
    ggml_build_forward_expand(c->graph, sum);
    return sum;
}

static void chain_open(struct chain *c, int n, enum defect defect) {
    c->n = n;
    c->backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(c->backend, 1);
    c->sched = ggml_backend_sched_new(&c->backend, NULL, 1, 256, false, false);
    c->memory = ggml_init((struct ggml_init_params){.mem_size = 32 * ggml_tensor_overhead(), .no_alloc = true});
    for (int il = 0; il < LAYERS; il++) {
        c->weight[il] = ggml_new_tensor_2d(c->memory, GGML_TYPE_F32, WIDTH, WIDTH);
        c->cache[il] = ggml_new_tensor_2d(c->memory, GGML_TYPE_F32, WIDTH, CELLS);
        ggml_format_name(c->cache[il], "cache_k_l%d", il);
    }
    c->buffer = ggml_backend_alloc_ctx_tensors(c->memory, c->backend);
    for (int il = 0; il < LAYERS; il++) {
        ggml_backend_tensor_set(c->weight[il], weights[il], 0, sizeof weights[il]);
        ggml_backend_tensor_memset(c->cache[il], 0, 0, ggml_nbytes(c->cache[il]));
    }
    c->ctx = ggml_init((struct ggml_init_params){
        .mem_size = 128 * ggml_tensor_overhead() + ggml_graph_overhead(), .no_alloc = true});
    c->graph = ggml_new_graph(c->ctx);
    c->in = ggml_new_tensor_2d(c->ctx, GGML_TYPE_F32, WIDTH, n);
    c->index = ggml_new_tensor_1d(c->ctx, GGML_TYPE_I64, n);
    ggml_set_input(c->in);
    ggml_set_input(c->index);
    struct ggml_tensor *x = ggml_scale(c->ctx, c->in, 2.0f), *below = NULL; /* runs in the tail too */
    for (int il = 0; il < LAYERS; il++) {
        x = layer(c, x, il, defect, below);
        below = il == 0 ? x : below;
    }
    c->out = ggml_scale(c->ctx, x, 0.5f);
    ggml_set_output(c->out);
    ggml_build_forward_expand(c->graph, c->out);
    if (!ggml_backend_sched_alloc_graph(c->sched, c->graph)) {
        abort();
    }
}

static void chain_close(struct chain *c) {
    ggml_backend_sched_free(c->sched);
    ggml_free(c->ctx);
    ggml_backend_buffer_free(c->buffer);
    ggml_free(c->memory);
    ggml_backend_free(c->backend);
}

static void run(struct chain *c, const float *in, ggml_backend_sched_eval_callback eval, void *data) {
    int64_t index[ROWS];
    for (int i = 0; i < c->n; i++) {
        index[i] = i;
    }
    ggml_backend_tensor_set(c->in, in, 0, ggml_nbytes(c->in));
    ggml_backend_tensor_set(c->index, index, 0, (size_t)c->n * sizeof index[0]);
    ggml_backend_sched_set_eval_callback(c->sched, eval, data);
    EXPECT(ggml_backend_sched_graph_compute(c->sched, c->graph) == GGML_STATUS_SUCCESS, "the graph failed");
}

static void flags_are_back(const struct chain *c) {
    for (int i = 0; i < ggml_graph_n_nodes(c->graph); i++) {
        EXPECT((ggml_graph_node(c->graph, i)->flags & GGML_TENSOR_FLAG_COMPUTE) != 0, "node %d lost its flag", i);
    }
}

/* Whether the first rows of a cache were written. */
static bool written(const struct chain *c, int il) {
    float row[WIDTH];
    ggml_backend_tensor_get(c->cache[il], row, 0, sizeof row);
    for (int i = 0; i < WIDTH; i++) {
        if (row[i] != 0.0f) {
            return true;
        }
    }
    return false;
}

static lv_tap *tap_new(int n, bool copy) {
    lv_tap *tap = lv_tap_new();
    tap->copy_always = copy;
    EXPECT(lv_tap_llm(tap, LAYERS, 1) == LV_OK && lv_tap_begin(tap, n, NULL, NULL, NULL) == LV_OK, "begin");
    return tap;
}

/* The front's rows after layer `cut`-1, with caches and flags as they must be. */
static void front(const float *in, int cut, bool copy, float *hidden) {
    struct chain c;
    chain_open(&c, ROWS, SOUND);
    lv_tap *tap = tap_new(ROWS, copy);
    for (int twice = 0; twice < 2; twice++) {
        EXPECT(lv_tap_begin(tap, ROWS, NULL, NULL, NULL) == LV_OK, "begin");
        EXPECT(lv_stage(tap, LV_STAGE_FRONT, cut, WIDTH, NULL) == LV_OK, "front: %s", lv_tap_error(tap));
        EXPECT(lv_stage_read(tap, hidden, ROWS * WIDTH) == LV_E_ARG, "read before the run");
        run(&c, in, lv_tap_eval, tap);
        EXPECT(lv_tap_end(tap) == LV_OK, "front: %s", lv_tap_error(tap));
        flags_are_back(&c);
    }
    EXPECT(lv_stage_read(tap, hidden, ROWS * WIDTH - 1) == LV_E_ARG && lv_stage_read(tap, NULL, 0) == LV_E_ARG, "size");
    EXPECT(lv_stage_read(tap, hidden, ROWS * WIDTH) == LV_OK, "read");
    for (int il = 0; il < LAYERS; il++) {
        EXPECT(written(&c, il) == (il < cut), "front at %d: cache %d", cut, il);
    }
    lv_tap_free(tap);
    chain_close(&c);
}

/* Rows 1, 4 and 8 alone go on: their results are those of the whole, bit for bit. */
static void halves_are_the_whole(int cut, bool copy) {
    static const int kept[] = {1, 4, 8};
    float in[ROWS * WIDTH], hidden[ROWS * WIDTH], whole[ROWS * WIDTH], some[3 * WIDTH], from[3 * WIDTH], got[3 * WIDTH];
    struct chain c;
    fill(in, ROWS * WIDTH);
    chain_open(&c, ROWS, SOUND);
    run(&c, in, NULL, NULL);
    ggml_backend_tensor_get(c.out, whole, 0, sizeof whole);
    chain_close(&c);
    front(in, cut, copy, hidden);
    for (int i = 0; i < 3; i++) {
        memcpy(some + i * WIDTH, in + kept[i] * WIDTH, WIDTH * sizeof(float));
        memcpy(from + i * WIDTH, hidden + kept[i] * WIDTH, WIDTH * sizeof(float));
    }
    chain_open(&c, 3, SOUND);
    lv_tap *tap = tap_new(3, copy);
    EXPECT(lv_stage(tap, LV_STAGE_TAIL, cut, WIDTH, from) == LV_OK, "tail: %s", lv_tap_error(tap));
    memset(from, 0, sizeof from); /* it was copied */
    run(&c, some, lv_tap_eval, tap);
    EXPECT(lv_tap_end(tap) == LV_OK, "tail: %s", lv_tap_error(tap));
    EXPECT(lv_stage_read(tap, got, 3 * WIDTH) == LV_E_ARG, "the tail has nothing to read");
    flags_are_back(&c);
    ggml_backend_tensor_get(c.out, got, 0, sizeof got);
    for (int i = 0; i < 3; i++) {
        EXPECT(memcmp(got + i * WIDTH, whole + kept[i] * WIDTH, WIDTH * sizeof(float)) == 0, "cut %d, row %d", cut, i);
    }
    for (int il = 0; il < LAYERS; il++) {
        EXPECT(written(&c, il) == (il >= cut), "tail at %d: cache %d", cut, il);
    }
    /* the next run is whole again */
    lv_tap_begin(tap, 3, NULL, NULL, NULL);
    run(&c, some, lv_tap_eval, tap);
    EXPECT(lv_tap_end(tap) == LV_OK && written(&c, 0), "after: %s", lv_tap_error(tap));
    lv_tap_free(tap);
    chain_close(&c);
}

/* A cache that is left out gives its pages back, wherever it begins; the others keep all they hold. */
static void left_out_caches_take_no_memory(int mode, int cut) {
    static float cells[CELLS * WIDTH];
    float rows[ROWS * WIDTH] = {0};
    struct chain c;
    chain_open(&c, ROWS, SOUND);
    for (size_t i = 0; i < CELLS * WIDTH; i++) {
        cells[i] = 1.0f;
    }
    for (int il = 0; il < LAYERS; il++) {
        ggml_backend_tensor_set(c.cache[il], cells, 0, sizeof cells);
    }
    lv_tap *tap = tap_new(ROWS, false);
    EXPECT(lv_stage(tap, mode, cut, WIDTH, mode == LV_STAGE_TAIL ? rows : NULL) == LV_OK, "%s", lv_tap_error(tap));
    run(&c, rows, lv_tap_eval, tap);
    EXPECT(lv_tap_end(tap) == LV_OK, "mode %d: %s", mode, lv_tap_error(tap));
    for (int il = 0; il < LAYERS; il++) {
        int kept = 0;
        ggml_backend_tensor_get(c.cache[il], cells, 0, sizeof cells);
        for (int i = ROWS * WIDTH; i < CELLS * WIDTH; i++) {
            kept += cells[i] == 1.0f;
        }
        const int all = (CELLS - ROWS) * WIDTH;
#ifdef __linux__
        const bool left_out = (mode == LV_STAGE_FRONT) == (il >= cut);
        EXPECT(left_out ? kept < all : kept == all, "mode %d, cut %d: cache %d keeps %d of %d", mode, cut, il, kept, all);
#else
        EXPECT(kept == all, "mode %d, cut %d: cache %d keeps %d of %d", mode, cut, il, kept, all);
#endif
    }
    lv_tap_free(tap);
    chain_close(&c);
}

static void wrong_graphs(enum defect defect, int mode, int width, const char *says) {
    float rows[ROWS * WIDTH] = {0};
    struct chain c;
    chain_open(&c, ROWS, defect);
    lv_tap *tap = tap_new(ROWS, false);
    EXPECT(lv_stage(tap, mode, 2, width, mode == LV_STAGE_TAIL ? rows : NULL) == LV_OK, "%s", lv_tap_error(tap));
    run(&c, rows, lv_tap_eval, tap);
    const int status = lv_tap_end(tap);
    EXPECT(status == LV_E_GRAPH && strstr(lv_tap_error(tap), says) != NULL, "defect %d: %d %s", defect, status,
           lv_tap_error(tap));
    flags_are_back(&c);
    lv_tap_free(tap);
    chain_close(&c);
}

struct stopper {
    lv_tap *tap;
    int at, n;
};

static bool stopping_eval(struct ggml_tensor *t, bool ask, void *data) {
    struct stopper *s = data;
    if (ask && s->n++ == s->at) {
        lv_tap_cancel(s->tap);
    }
    return lv_tap_eval(t, ask, s->tap);
}

static void cancels(int mode) {
    float rows[ROWS * WIDTH];
    fill(rows, ROWS * WIDTH);
    struct chain c;
    chain_open(&c, ROWS, SOUND);
    lv_tap *tap = tap_new(ROWS, false);
    for (int at = 0; at < ggml_graph_n_nodes(c.graph); at++) {
        lv_tap_begin(tap, ROWS, NULL, NULL, NULL);
        lv_stage(tap, mode, 2, WIDTH, mode == LV_STAGE_TAIL ? rows : NULL);
        struct stopper s = {tap, at, 0};
        run(&c, rows, stopping_eval, &s);
        EXPECT(lv_tap_end(tap) == LV_E_CANCELLED, "cancel at %d: %s", at, lv_tap_error(tap));
        flags_are_back(&c);
        lv_tap_cancel_reset(tap);
    }
    lv_tap_free(tap);
    chain_close(&c);
}

static void arguments(void) {
    const float rows[ROWS * WIDTH] = {0};
    lv_tap *tap = tap_new(ROWS, false);
    static const struct {
        int mode, layer, width;
        bool rows;
    } wrong[] = {{LV_STAGE_OFF, 1, WIDTH, false},      {3, 1, WIDTH, false},
                 {LV_STAGE_FRONT, 0, WIDTH, false},    {LV_STAGE_FRONT, LAYERS, WIDTH, false},
                 {LV_STAGE_FRONT, -1, WIDTH, false},   {LV_STAGE_FRONT, 1, 0, false},
                 {LV_STAGE_FRONT, 1, INT32_MAX, false}, {LV_STAGE_FRONT, 1, WIDTH, true},
                 {LV_STAGE_TAIL, 1, WIDTH, false}};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        EXPECT(lv_tap_begin(tap, ROWS, NULL, NULL, NULL) == LV_OK, "begin");
        EXPECT(lv_stage(tap, wrong[i].mode, wrong[i].layer, wrong[i].width, wrong[i].rows ? rows : NULL) == LV_E_ARG,
               "argument %zu", i);
        EXPECT(lv_tap_end(tap) == LV_E_ARG, "a stage that was refused, %zu", i);
    }
    EXPECT(lv_stage(tap, LV_STAGE_FRONT, 1, WIDTH, NULL) == LV_E_ARG, "without a run");
    EXPECT(lv_stage(NULL, LV_STAGE_FRONT, 1, WIDTH, NULL) == LV_E_ARG && lv_stage_read(NULL, NULL, 0) == LV_E_ARG, "no tap");
    lv_tap_free(tap);
}

void stage_tests(void) {
    for (int il = 0; il < LAYERS; il++) {
        fill(weights[il], WIDTH * WIDTH);
    }
    for (int cut = 1; cut < LAYERS; cut++) {
        halves_are_the_whole(cut, cut % 2 == 0);
    }
    wrong_graphs(READS_BELOW, LV_STAGE_TAIL, WIDTH, "reads 'l_out-0'");
    wrong_graphs(SHARES_CACHE, LV_STAGE_TAIL, WIDTH, "reads 'cache_k_l0'");
    for (int mode = LV_STAGE_FRONT; mode <= LV_STAGE_TAIL; mode++) {
        wrong_graphs(NO_CUT, mode, WIDTH, "no node 'l_out-1'");
        wrong_graphs(TWO_CUTS, mode, WIDTH, "two nodes 'l_out-1'");
        wrong_graphs(SOUND, mode, WIDTH - 1, "expected 31 x 9");
        cancels(mode);
        left_out_caches_take_no_memory(mode, 1);
        left_out_caches_take_no_memory(mode, 2);
    }
    arguments();
}
