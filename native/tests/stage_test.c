/* stage_test.c - a chain of layers run whole, and in pieces, on fewer rows from piece to piece. */
#include <stdlib.h>
#include <string.h>

#include "fixture.h"
#include "ggml-cpu.h"

#define WIDTH 32
#define LAYERS 4
#define ROWS 9
#define CELLS 512 /* of a cache: 64 KiB, so that it has whole pages */

enum defect { SOUND = 0, READS_BELOW, READS_COPY, SHARES_CACHE, NO_CUT, TWO_CUTS };

static const char *copied = ""; /* name of what READS_COPY reads, as a scheduler makes it for another device */

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

/* norm, a write to the cache, a product, the sum: every row for itself, so that a piece's rows are those of the whole. */
static struct ggml_tensor *layer(struct chain *c, struct ggml_tensor *x, int il, enum defect defect,
                                 struct ggml_tensor *below) {
    struct ggml_tensor *norm = ggml_rms_norm(c->ctx, x, 1e-5f);
    ggml_format_name(norm, "norm-%d", il);
    ggml_build_forward_expand(c->graph, ggml_set_rows(c->ctx, c->cache[il], norm, c->index));
    if (defect == READS_BELOW && il == 2) {
        norm = ggml_add(c->ctx, norm, ggml_reshape_2d(c->ctx, below, WIDTH, c->n));
    }
    if (defect == READS_COPY && il == 2) {
        struct ggml_tensor *copy = ggml_set_name(ggml_new_tensor_2d(c->ctx, GGML_TYPE_F32, WIDTH, c->n), copied);
        ggml_set_input(copy);
        norm = ggml_add(c->ctx, norm, copy);
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
    struct ggml_tensor *x = ggml_scale(c->ctx, c->in, 2.0f), *below = NULL; /* runs whatever is left out */
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

static int stage(lv_tap *tap, int first, int end, const float *hidden, bool keep) {
    return lv_stage(tap, first, end, WIDTH, hidden, keep);
}

/* The rows after layer end-1, of n that layer first-1 gave, with caches and flags as they must be; those below are left
 * as the run before this one in the same context left them. `out` gets the graph's result instead where there are no
 * layers after these. */
static void piece(struct chain *c, lv_tap *tap, int first, int end, bool keep, const float *in, const float *hidden,
                  float *out) {
    const size_t n = (size_t)c->n * WIDTH;
    bool before[LAYERS];
    for (int il = 0; il < LAYERS; il++) {
        before[il] = written(c, il);
    }
    for (int twice = 0; twice < 2; twice++) {
        float *copy = hidden != NULL ? malloc(n * sizeof(float)) : NULL;
        if (copy != NULL) {
            memcpy(copy, hidden, n * sizeof(float));
        }
        EXPECT(lv_tap_begin(tap, c->n, NULL, NULL, NULL) == LV_OK, "begin");
        EXPECT(stage(tap, first, end, copy, keep) == LV_OK, "%d to %d: %s", first, end, lv_tap_error(tap));
        free(copy); /* it was copied */
        EXPECT(lv_stage_read(tap, out, n) == LV_E_ARG, "read before the run");
        run(c, in, lv_tap_eval, tap);
        EXPECT(lv_tap_end(tap) == LV_OK, "%d to %d: %s", first, end, lv_tap_error(tap));
        flags_are_back(c);
    }
    EXPECT(lv_stage_read(tap, out, n - 1) == LV_E_ARG && lv_stage_read(tap, NULL, 0) == LV_E_ARG, "size");
    EXPECT(lv_stage_read(tap, out, n) == (end < LAYERS ? LV_OK : LV_E_ARG), "read after %d to %d", first, end);
    if (end == LAYERS) {
        ggml_backend_tensor_get(c->out, out, 0, n * sizeof(float));
    }
    for (int il = 0; il < LAYERS; il++) {
        const bool runs = il >= first && il < end;
        EXPECT(written(c, il) == (runs || before[il]), "%d to %d: cache %d", first, end, il);
    }
}

/* Rows kept[i] of n. */
static void select_rows(float *to, const float *from, const int *kept, int n) {
    for (int i = 0; i < n; i++) {
        memcpy(to + i * WIDTH, from + kept[i] * WIDTH, WIDTH * sizeof(float));
    }
}

/* Before layers a <= b <= c some rows leave: six at a, none at b if it is another layer, and one at c. What stays is as
 * in the whole, bit for bit; a to b and b to c share a context. */
static void pieces_are_the_whole(int a, int b, int c, bool copy) {
    static const int kept[] = {1, 4, 8}, last[] = {0, 2}, both[] = {1, 8};
    float in[ROWS * WIDTH], hidden[ROWS * WIDTH], whole[ROWS * WIDTH], some[3 * WIDTH], from[3 * WIDTH], got[3 * WIDTH];
    struct chain chain;
    fill(in, ROWS * WIDTH);
    chain_open(&chain, ROWS, SOUND);
    run(&chain, in, NULL, NULL);
    ggml_backend_tensor_get(chain.out, whole, 0, sizeof whole);
    chain_close(&chain);

    lv_tap *tap = tap_new(ROWS, copy);
    chain_open(&chain, ROWS, SOUND);
    piece(&chain, tap, 0, a, false, in, NULL, hidden);
    chain_close(&chain);
    select_rows(some, in, kept, 3);
    select_rows(from, hidden, kept, 3);
    if (a < c) {
        chain_open(&chain, 3, SOUND);
        if (a < b) {
            piece(&chain, tap, a, b, false, some, from, got);
            memcpy(from, got, sizeof from);
        }
        if (b < c) {
            piece(&chain, tap, b, c, a < b, some, from, got);
            memcpy(from, got, sizeof from);
        }
        for (int il = 0; il < LAYERS; il++) {
            EXPECT(written(&chain, il) == (il >= a && il < c), "%d, %d, %d: cache %d", a, b, c, il);
        }
        chain_close(&chain);
    }
    chain_open(&chain, 2, SOUND);
    select_rows(some, in, both, 2);
    select_rows(hidden, from, last, 2);
    piece(&chain, tap, c, LAYERS, false, some, hidden, got);
    for (int i = 0; i < 2; i++) {
        EXPECT(memcmp(got + i * WIDTH, whole + both[i] * WIDTH, WIDTH * sizeof(float)) == 0, "%d, %d, %d: row %d", a, b, c, i);
    }
    /* the next run is whole again */
    lv_tap_begin(tap, 2, NULL, NULL, NULL);
    run(&chain, some, lv_tap_eval, tap);
    EXPECT(lv_tap_end(tap) == LV_OK && written(&chain, 0), "after: %s", lv_tap_error(tap));
    lv_tap_free(tap);
    chain_close(&chain);
}

/* A cache that is left out gives its pages back, wherever it begins, unless it lies below and is to be kept; the others
 * keep all they hold. */
static void left_out_caches_take_no_memory(int first, int end, bool keep) {
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
    EXPECT(stage(tap, first, end, first > 0 ? rows : NULL, keep) == LV_OK, "%s", lv_tap_error(tap));
    run(&c, rows, lv_tap_eval, tap);
    EXPECT(lv_tap_end(tap) == LV_OK, "%d to %d: %s", first, end, lv_tap_error(tap));
    for (int il = 0; il < LAYERS; il++) {
        int kept = 0;
        ggml_backend_tensor_get(c.cache[il], cells, 0, sizeof cells);
        for (int i = ROWS * WIDTH; i < CELLS * WIDTH; i++) {
            kept += cells[i] == 1.0f;
        }
        const int all = (CELLS - ROWS) * WIDTH;
#ifdef __linux__
        const bool gone = il >= end || (il < first && !keep);
        EXPECT(gone ? kept < all : kept == all, "%d to %d: cache %d keeps %d of %d", first, end, il, kept, all);
#else
        EXPECT(kept == all, "%d to %d: cache %d keeps %d of %d", first, end, il, kept, all);
#endif
    }
    lv_tap_free(tap);
    chain_close(&c);
}

static void wrong_graphs(enum defect defect, int first, int end, int width, const char *says) {
    float rows[ROWS * WIDTH] = {0};
    struct chain c;
    chain_open(&c, ROWS, defect);
    lv_tap *tap = tap_new(ROWS, false);
    EXPECT(lv_stage(tap, first, end, width, first > 0 ? rows : NULL, false) == LV_OK, "%s", lv_tap_error(tap));
    run(&c, rows, lv_tap_eval, tap);
    const int status = lv_tap_end(tap);
    EXPECT(status == LV_E_GRAPH && strstr(lv_tap_error(tap), says) != NULL, "defect %d: %d %s", defect, status,
           lv_tap_error(tap));
    flags_are_back(&c);
    lv_tap_free(tap);
    chain_close(&c);
}

/* Of results for another device, only the names of the copies tell what they are. */
static void copies(void) {
    static const char *const lost[][2] = {{"GPU1#l_out-0 (reshaped)#0", "reads 'l_out-0'"},
                                          {"GPU1#norm-1#0", "reads 'norm-1'"},
                                          {"GPU1#cache_k_l0 (view) (permuted)#0", "reads 'cache_k_l0"}};
    static const char *const there[] = {"GPU1#l_out-1#0", "GPU1#l_out-1 (view)#0", "GPU1#inp_pos#0", "GPU1#norm-2#0",
                                        "GPU1#cache_k_l2#0", "GPU1#norm-11#0", "l_out-0"};
    for (size_t i = 0; i < sizeof lost / sizeof lost[0]; i++) {
        copied = lost[i][0];
        wrong_graphs(READS_COPY, 2, LAYERS, WIDTH, lost[i][1]);
    }
    for (size_t i = 0; i < sizeof there / sizeof there[0]; i++) {
        float rows[ROWS * WIDTH] = {0};
        struct chain c;
        copied = there[i];
        chain_open(&c, ROWS, READS_COPY);
        lv_tap *tap = tap_new(ROWS, false);
        EXPECT(stage(tap, 2, LAYERS, rows, false) == LV_OK, "%s", lv_tap_error(tap));
        run(&c, rows, lv_tap_eval, tap);
        EXPECT(lv_tap_end(tap) == LV_OK, "'%s': %s", copied, lv_tap_error(tap));
        lv_tap_free(tap);
        chain_close(&c);
    }
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

static void cancels(int first, int end) {
    float rows[ROWS * WIDTH];
    fill(rows, ROWS * WIDTH);
    struct chain c;
    chain_open(&c, ROWS, SOUND);
    lv_tap *tap = tap_new(ROWS, false);
    for (int at = 0; at < ggml_graph_n_nodes(c.graph); at++) {
        lv_tap_begin(tap, ROWS, NULL, NULL, NULL);
        stage(tap, first, end, first > 0 ? rows : NULL, false);
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
        int first, end, width;
        bool rows;
    } wrong[] = {{0, LAYERS, WIDTH, false},     {2, 2, WIDTH, true},       {3, 2, WIDTH, true},
                 {0, 0, WIDTH, false},          {-1, 2, WIDTH, false},     {-1, 2, WIDTH, true},
                 {1, LAYERS + 1, WIDTH, true},  {0, 1, 0, false},          {0, 1, INT32_MAX, false},
                 {0, 1, WIDTH, true},           {1, LAYERS, WIDTH, false}, {LAYERS, LAYERS, WIDTH, true}};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        EXPECT(lv_tap_begin(tap, ROWS, NULL, NULL, NULL) == LV_OK, "begin");
        EXPECT(lv_stage(tap, wrong[i].first, wrong[i].end, wrong[i].width, wrong[i].rows ? rows : NULL, false) == LV_E_ARG,
               "argument %zu", i);
        EXPECT(lv_tap_end(tap) == LV_E_ARG, "a stage that was refused, %zu", i);
    }
    EXPECT(stage(tap, 0, 1, NULL, false) == LV_E_ARG, "without a run");
    EXPECT(stage(NULL, 0, 1, NULL, false) == LV_E_ARG && lv_stage_read(NULL, NULL, 0) == LV_E_ARG, "no tap");
    lv_tap_free(tap);
}

void stage_tests(void) {
    static const int ranges[][2] = {{0, 2}, {2, LAYERS}, {1, 3}, {2, 3}};
    for (int il = 0; il < LAYERS; il++) {
        fill(weights[il], WIDTH * WIDTH);
    }
    for (int a = 1; a < LAYERS; a++) {
        for (int b = a; b < LAYERS; b++) {
            for (int c = b; c < LAYERS; c++) {
                pieces_are_the_whole(a, b, c, (a + b + c) % 2 == 0);
            }
        }
    }
    wrong_graphs(READS_BELOW, 2, LAYERS, WIDTH, "reads 'l_out-0'");
    wrong_graphs(READS_BELOW, 2, 3, WIDTH, "reads 'l_out-0'");
    wrong_graphs(SHARES_CACHE, 2, LAYERS, WIDTH, "reads 'cache_k_l0'");
    copies();
    wrong_graphs(NO_CUT, 1, 2, WIDTH, "no node 'l_out-1'");
    wrong_graphs(TWO_CUTS, 1, 2, WIDTH, "two nodes 'l_out-1'");
    for (int i = 0; i < 2; i++) {
        wrong_graphs(NO_CUT, ranges[i][0], ranges[i][1], WIDTH, "no node 'l_out-1'");
        wrong_graphs(TWO_CUTS, ranges[i][0], ranges[i][1], WIDTH, "two nodes 'l_out-1'");
    }
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++) {
        wrong_graphs(SOUND, ranges[i][0], ranges[i][1], WIDTH - 1, "expected 31 x 9");
        cancels(ranges[i][0], ranges[i][1]);
        left_out_caches_take_no_memory(ranges[i][0], ranges[i][1], false);
        left_out_caches_take_no_memory(ranges[i][0], ranges[i][1], true);
    }
    arguments();
}
