/* tap_test.c - the tap against random graphs, wrong graphs, wrong arguments and cancels. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fixture.h"

#define N_IMAGE 50

static const struct lv_kernels *kernels[3];
static int n_kernels;

static void find_kernels(void) {
    kernels[n_kernels++] = &lv_kernels_base;
#ifdef LV_HAVE_X86_VARIANTS
    const struct lv_kernels *best = lv_kernels_pick();
    if (best != &lv_kernels_base) {
        kernels[n_kernels++] = &lv_kernels_avx2;
    }
    if (best == &lv_kernels_avx512) {
        kernels[n_kernels++] = best;
    }
#endif
}

/* Every half there is, against ggml's own conversion; NaN stays NaN. */
static void halves(void) {
    static uint16_t all[65536];
    static float got[65536];
    for (int i = 0; i < 65536; i++) {
        all[i] = (uint16_t)i;
    }
    for (int k = 0; k < n_kernels; k++) {
        for (int from = 0; from < 65536; from += 65521) { /* two lengths: with and without a tail */
            kernels[k]->from_f16(all + from, got + from, 65536 - from);
        }
        int wrong = 0;
        for (int i = 0; i < 65536; i++) {
            const float want = ggml_fp16_to_fp32((ggml_fp16_t)i);
            wrong += !(got[i] == want || (isnan(got[i]) && isnan(want)));
        }
        EXPECT(wrong == 0, "%s: %d halves are wrong", kernels[k]->name, wrong);
    }
}

static lv_tap *tap_for(const struct shape *s, int kernel, int threads, bool copy) {
    lv_tap *tap = lv_tap_new();
    tap->kernels = kernels[kernel];
    tap->copy_always = copy;
    lv_tap_threads(tap, threads);
    EXPECT(lv_tap_llm(tap, s->n_layer, s->n_head) == LV_OK, "llm: %s", lv_tap_error(tap));
    EXPECT(lv_tap_reset(tap, N_IMAGE, 7) == LV_OK, "reset: %s", lv_tap_error(tap));
    return tap;
}

/* begin, compute, end, and what is expected of it */
static int step(struct model *m, lv_tap *tap, const struct batch *b, const char *what) {
    struct run *r = run_build(m, b);
    int status = lv_tap_begin(tap, b->n, b->image, b->rows, NULL);
    EXPECT(status == LV_OK, "%s begin: %s", what, lv_tap_error(tap));
    EXPECT(run_compute(m, r, lv_tap_eval, tap) == 0, "%s: the graph failed", what);
    status = lv_tap_end(tap);
    EXPECT(status == LV_OK, "%s end %d: %s", what, status, lv_tap_error(tap));
    run_expect(m, r, b, N_IMAGE);
    run_free(m, r);
    return status;
}

static void image_rows(int32_t *image, int n, int from) {
    for (int i = 0; i < n; i++) {
        image[i] = from + i;
    }
}

/* More rows than one group of blocks; from 64 rows on ggml itself lets NaN in hidden cells through. */
static int many_rows(const struct model *m) { return m->s.fill_nan ? 60 : 70; }

/* Text, a picture in two chunks, text over some of its cells, a prompt, generated tokens. */
static void conversation(struct model *m, lv_tap *tap, const char *what) {
    int32_t image[MAX_ROWS];
    uint8_t rows[MAX_ROWS];
    memset(rows, 0, sizeof rows);
    step(m, tap, &(struct batch){.n = 5, .reuse = -1}, what);
    image_rows(image, 30, 0);
    step(m, tap, &(struct batch){.n = 30, .image = image, .rows = rows, .reuse = -1}, what);
    image_rows(image, 20, 30);
    image[7] = -1; /* a text row among image rows */
    step(m, tap, &(struct batch){.n = 20, .image = image, .rows = rows, .reuse = -1}, what);
    step(m, tap, &(struct batch){.n = 3, .reuse = 12}, what); /* takes cells of image tokens 7..9 */
    memset(rows, LV_ROW_PROMPT, 37);
    rows[0] = LV_ROW_NONE;
    rows[36] = LV_ROW_PROMPT | LV_ROW_LAST;
    step(m, tap, &(struct batch){.n = 37, .rows = rows, .reuse = -1}, what);
    rows[0] = LV_ROW_GENERATED;
    for (int i = 0; i < 3; i++) {
        step(m, tap, &(struct batch){.n = 1, .rows = rows, .reuse = -1}, what);
    }
    memset(rows, LV_ROW_GENERATED, 3);
    step(m, tap, &(struct batch){.n = 3, .rows = rows, .reuse = -1}, what);
    memset(rows, LV_ROW_PROMPT, MAX_ROWS);
    step(m, tap, &(struct batch){.n = many_rows(m), .rows = rows, .reuse = -1}, what);
}

static void compare(const struct model *m, const lv_tap *tap, float tolerance, const char *what) {
    const size_t n = (size_t)m->s.n_layer * (size_t)m->s.n_head * N_IMAGE;
    float *got = malloc(n * sizeof(float));
    for (int c = 0; c < LV_N_CLASS; c++) {
        for (int r = 0; r < LV_N_REDUCTION; r++) {
            EXPECT(lv_tap_read(tap, c, r, got, n) == LV_OK, "%s: read %d %d", what, c, r);
            double worst = 0.0, top = 0.0;
            for (size_t i = 0; i < n; i++) {
                const double want = m->sums[c][r][i / N_IMAGE / (size_t)m->s.n_head][i / N_IMAGE % (size_t)m->s.n_head]
                                           [i % N_IMAGE];
                worst = fmax(worst, fabs(want - got[i]));
                top = fmax(top, want);
            }
            EXPECT(top > 0.0 && worst <= tolerance * top, "%s: class %d reduction %d is off by %.3g of %.3g", what, c, r,
                   worst, top);
        }
    }
    EXPECT(lv_tap_rows(tap, 0) == 36 + many_rows(m) && lv_tap_rows(tap, 1) == 6 && lv_tap_rows(tap, 2) == 1, "%s: rows %d %d %d",
           what, (int)lv_tap_rows(tap, 0), (int)lv_tap_rows(tap, 1), (int)lv_tap_rows(tap, 2));
    free(got);
}

static void check_shape(const struct shape *s, int kernel, int threads, bool copy, const char *name) {
    char what[128];
    snprintf(what, sizeof what, "%s, %s, %d threads%s", name, kernels[kernel]->name, threads, copy ? ", fetched" : "");
    struct model *m = model_new(s);
    lv_tap *tap = tap_for(s, kernel, threads, copy);
    EXPECT(lv_tap_check(tap, true, 0.02f) == LV_OK, "check");
    conversation(m, tap, what);
    /* without flash attention ggml's own F16 products are read, not ours */
    compare(m, tap, s->flash ? 1e-5f : 2e-3f, what);
    lv_tap_free(tap);
    model_free(m);
}

static const struct shape plain = {.type = GGML_TYPE_F16, .n_layer = 3, .n_head = 4, .n_head_kv = 4, .d = 64,
                                   .scale = 0.125f, .flash = true, .fill_nan = true};

static void shapes(void) {
    struct shape s = plain;
    for (int k = 0; k < n_kernels; k++) {
        check_shape(&s, k, 1, false, "plain");
        check_shape(&s, k, 3, true, "plain");
        s.n_head_kv = 2;
        s.type = GGML_TYPE_F32;
        check_shape(&s, k, 2, false, "F32 and GQA");
        s.type = GGML_TYPE_Q8_0;
        s.fill_nan = false;
        s.sinks = true;
        check_shape(&s, k, 1, false, "Q8_0 and sinks");
        s.type = GGML_TYPE_BF16;
        s.softcap = 3.0f;
        check_shape(&s, k, 1, false, "BF16, sinks and a soft cap");
        s = plain;
        s.max_bias = 8.0f;
        s.n_head = s.n_head_kv = 6;
        s.d = 40; /* no multiple of the vectors */
        check_shape(&s, k, 2, false, "ALiBi");
        s = plain;
        s.sliding = true;
        check_shape(&s, k, 1, false, "two caches");
    }
    s.flash = s.fill_nan = false;
    check_shape(&s, 0, 1, false, "no flash attention");
    s.softcap = 3.0f;
    s.sinks = true;
    check_shape(&s, 0, 1, true, "no flash attention, capped");
}

/* ---- self-check ---- */

struct spoil {
    lv_tap *tap;
    int how; /* 1: another scale, 2: another V, 3: another name for q */
};

static bool spoiled_eval(struct ggml_tensor *t, bool ask, void *data) {
    const struct spoil *s = data;
    if (ask || t->op != GGML_OP_FLASH_ATTN_EXT) {
        return lv_tap_eval(t, ask, s->tap);
    }
    float scale;
    memcpy(&scale, t->op_params, sizeof scale);
    const float wrong = 1.5f * scale;
    if (s->how == 1) {
        memcpy(t->op_params, &wrong, sizeof wrong);
    } else if (s->how == 2) {
        memset(t->src[2]->data, 0, ggml_nbytes(t->src[2]));
    } else {
        ggml_set_name(t->src[0], "Qcur-0");
    }
    return lv_tap_eval(t, ask, s->tap);
}

static void self_check(int how, int expected, const char *names) {
    struct model *m = model_new(&plain);
    lv_tap *tap = tap_for(&plain, 0, 1, false);
    int32_t image[10];
    uint8_t rows[10];
    image_rows(image, 10, 0);
    memset(rows, LV_ROW_PROMPT, 10);
    lv_tap_check(tap, true, 0.01f);
    struct run *r = run_build(m, &(struct batch){.n = 10, .image = image, .reuse = -1});
    EXPECT(lv_tap_begin(tap, 10, image, rows, NULL) == LV_OK, "begin");
    struct spoil s = {tap, how};
    run_compute(m, r, spoiled_eval, &s);
    const int status = lv_tap_end(tap);
    EXPECT(status == expected && strstr(lv_tap_error(tap), names) != NULL, "spoil %d: %d '%s'", how, status,
           lv_tap_error(tap));
    EXPECT(how == 3 || lv_tap_check_worst(tap) > 0.01f, "worst %g", (double)lv_tap_check_worst(tap));
    run_free(m, r);
    lv_tap_free(tap);
    model_free(m);
}

/* ---- wrong graphs ---- */

static void wrong_graphs(void) {
    struct model *m = model_new(&plain);
    lv_tap *tap = tap_for(&plain, 0, 1, false);
    uint8_t rows[8] = {LV_ROW_PROMPT, LV_ROW_PROMPT, 1, 1, 1, 1, 1, 1};
    struct run *r = run_build(m, &(struct batch){.n = 8, .reuse = -1});
    lv_tap_begin(tap, 5, NULL, rows, NULL); /* five rows announced, eight in the graph */
    run_compute(m, r, lv_tap_eval, tap);
    EXPECT(lv_tap_end(tap) == LV_E_GRAPH && strstr(lv_tap_error(tap), "8 rows"), "rows: %s", lv_tap_error(tap));
    lv_tap_begin(tap, 8, NULL, rows, NULL);
    run_compute(m, r, lv_tap_eval, tap);
    run_compute(m, r, lv_tap_eval, tap); /* a second graph in one run */
    EXPECT(lv_tap_end(tap) == LV_E_GRAPH && strstr(lv_tap_error(tap), "seen before"), "twice: %s", lv_tap_error(tap));
    lv_tap_begin(tap, 8, NULL, rows, NULL);
    EXPECT(lv_tap_end(tap) == LV_E_GRAPH, "a run without a graph: %s", lv_tap_error(tap));
    lv_tap_llm(tap, plain.n_layer, plain.n_head + 1);
    lv_tap_begin(tap, 8, NULL, rows, NULL);
    run_compute(m, r, lv_tap_eval, tap);
    EXPECT(lv_tap_end(tap) == LV_E_GRAPH && strstr(lv_tap_error(tap), "expected 5"), "heads: %s", lv_tap_error(tap));
    lv_tap_llm(tap, plain.n_layer - 1, plain.n_head);
    lv_tap_begin(tap, 8, NULL, rows, NULL);
    run_compute(m, r, lv_tap_eval, tap);
    EXPECT(lv_tap_end(tap) == LV_E_GRAPH && strstr(lv_tap_error(tap), "layer 2 of 2"), "layers: %s", lv_tap_error(tap));
    const int64_t outside = N_CELLS;
    ggml_backend_tensor_set(r->index[0], &outside, 0, sizeof outside);
    lv_tap_begin(tap, 8, NULL, NULL, NULL);
    struct ggml_tensor *store = ggml_graph_node(r->graph, 0);
    for (int i = 0; store->op != GGML_OP_SET_ROWS; store = ggml_graph_node(r->graph, ++i)) {
    }
    lv_tap_eval(store, true, tap); /* asked only: computing it would abort */
    EXPECT(lv_tap_end(tap) == LV_E_GRAPH && strstr(lv_tap_error(tap), "cell 256 of 256"), "cell: %s",
           lv_tap_error(tap));
    run_free(m, r);
    lv_tap_free(tap);
    model_free(m);
}

/* ---- cancel ---- */

struct stopper {
    lv_tap *tap;
    int at, n; /* cancels when node number `at` is asked about */
};

static bool stopping_eval(struct ggml_tensor *t, bool ask, void *data) {
    struct stopper *s = data;
    if (ask && s->n++ == s->at) {
        lv_tap_cancel(s->tap);
    }
    return lv_tap_eval(t, ask, s->tap);
}

static void read_out(const struct model *m, const struct run *r, float *out) {
    const struct ggml_tensor *last = r->out[m->s.n_layer - 1];
    ggml_backend_tensor_get(last, out, 0, ggml_nbytes(last));
}

static void cancel(void) {
    struct model *m = model_new(&plain);
    lv_tap *tap = tap_for(&plain, 0, 1, false);
    struct run *r = run_build(m, &(struct batch){.n = 9, .reuse = -1});
    const size_t size = ggml_nbytes(r->out[plain.n_layer - 1]);
    float *want = malloc(size), *got = malloc(size);
    uint8_t rows[9];
    memset(rows, LV_ROW_PROMPT, sizeof rows);
    run_compute(m, r, NULL, NULL);
    read_out(m, r, want);
    const int n_nodes = ggml_graph_n_nodes(r->graph);
    for (int at = 0; at < n_nodes; at++) {
        lv_tap_cancel_points(tap, at % 2 == 1);
        lv_tap_begin(tap, 9, NULL, at % 3 == 0 ? NULL : rows, NULL);
        struct stopper s = {tap, at, 0};
        memset(r->out[2]->data, 0, size);
        run_compute(m, r, stopping_eval, &s);
        read_out(m, r, got);
        EXPECT(at > n_nodes - 4 || memcmp(got, want, size) != 0, "cancel at %d: computed to the end", at);
        EXPECT(lv_tap_abort(tap), "abort");
        EXPECT(lv_tap_end(tap) == LV_E_CANCELLED, "cancel at %d: %s", at, lv_tap_error(tap));
        for (int i = 0; i < n_nodes; i++) {
            EXPECT((ggml_graph_node(r->graph, i)->flags & GGML_TENSOR_FLAG_COMPUTE) != 0, "node %d lost its flag", i);
        }
        lv_tap_cancel_reset(tap);
        lv_tap_begin(tap, 9, NULL, rows, NULL);
        run_compute(m, r, lv_tap_eval, tap);
        EXPECT(lv_tap_end(tap) == LV_OK && !lv_tap_abort(tap), "after cancel: %s", lv_tap_error(tap));
        read_out(m, r, got);
        EXPECT(memcmp(got, want, size) == 0, "another result after a cancel at %d", at);
    }
    free(want);
    free(got);
    run_free(m, r);
    lv_tap_free(tap);
    model_free(m);
}

/* ---- the rest ---- */

static int count_needs(struct run *r, lv_tap *tap) {
    int needs = 0;
    for (int i = 0; i < ggml_graph_n_nodes(r->graph); i++) {
        needs += lv_tap_eval(ggml_graph_node(r->graph, i), true, tap);
    }
    return needs;
}

static void disarmed(void) {
    struct model *m = model_new(&plain);
    lv_tap *tap = tap_for(&plain, 0, 1, false);
    struct run *r = run_build(m, &(struct batch){.n = 4, .reuse = -1});
    const uint8_t rows[4] = {0, 0, 0, LV_ROW_LAST};
    lv_tap_begin(tap, 4, NULL, NULL, NULL);
    EXPECT(count_needs(r, tap) == 0, "disarmed, but nodes are wanted");
    EXPECT(lv_tap_end(tap) == LV_OK, "disarmed: %s", lv_tap_error(tap));
    lv_tap_begin(tap, 4, NULL, rows, NULL);
    EXPECT(count_needs(r, tap) == plain.n_layer, "one node a layer");
    lv_tap_end(tap);
    lv_tap_cancel_points(tap, true);
    EXPECT(count_needs(r, tap) == plain.n_layer, "idle with cancel points");
    run_free(m, r);
    r = run_build(m, &(struct batch){.n = 1, .reuse = -1});
    EXPECT(plain.n_head > LV_FEW_ROWS || count_needs(r, tap) == 0, "cancel points for a single row");
    run_free(m, r);
    lv_tap_free(tap);
    model_free(m);
}

/* Cells remembered over a reset, dropped by an index that is gone, and by lv_tap_forget. */
static void remembered(void) {
    struct model *m = model_new(&plain);
    lv_tap *tap = tap_for(&plain, 0, 1, false);
    int32_t image[40];
    image_rows(image, 40, 0);
    step(m, tap, &(struct batch){.n = 40, .image = image, .reuse = -1}, "remembered");
    const uint8_t row = LV_ROW_LAST;
    float out[3 * 4 * N_IMAGE];
    for (int round = 0; round < 3; round++) {
        const int n_image = round == 0 ? 10 : 40;
        if (round == 2) {
            lv_tap_forget(tap);
        }
        EXPECT(lv_tap_reset(tap, n_image, 1) == LV_OK, "reset");
        step(m, tap, &(struct batch){.n = 1, .rows = &row, .reuse = -1}, "remembered");
        EXPECT(lv_tap_read(tap, 2, LV_SUM, out, (size_t)(12 * n_image)) == LV_OK, "read");
        int nonzero = 0;
        for (int i = 0; i < n_image; i++) {
            nonzero += out[i] > 0.0f;
        }
        /* round 1 asks for 40 again, but 10..39 were dropped by the reset to 10; some cells are holes in the mask */
        EXPECT(round == 2 ? nonzero == 0 : nonzero > 4 && nonzero <= 10, "round %d: %d image tokens seen", round, nonzero);
    }
    lv_tap_free(tap);
    model_free(m);
}

/* A batch that nobody described takes the cells of image tokens: they must not count any more. */
static void undescribed(void) {
    struct model *m = model_new(&plain);
    lv_tap *tap = tap_for(&plain, 0, 1, false);
    int32_t image[20];
    image_rows(image, 20, 0);
    step(m, tap, &(struct batch){.n = 20, .image = image, .reuse = -1}, "undescribed");
    struct run *r = run_build(m, &(struct batch){.n = 15, .reuse = 0});
    EXPECT(run_compute(m, r, lv_tap_eval, tap) == 0, "undescribed");
    run_free(m, r);
    const uint8_t row = LV_ROW_LAST;
    float out[3 * 4 * N_IMAGE];
    step(m, tap, &(struct batch){.n = 1, .rows = &row, .reuse = -1}, "undescribed");
    EXPECT(lv_tap_read(tap, 2, LV_SUM, out, 3 * 4 * N_IMAGE) == LV_OK, "read");
    int taken = 0, kept = 0;
    for (int i = 0; i < N_IMAGE; i++) {
        *(i < 15 ? &taken : &kept) += out[i] > 0.0f;
    }
    EXPECT(taken == 0 && kept > 0, "%d overwritten tokens seen, %d others", taken, kept);
    lv_tap_free(tap);
    model_free(m);
}

static void positions(void) {
    struct ggml_context *ctx = ggml_init((struct ggml_init_params){.mem_size = 1 << 20});
    struct ggml_tensor *x = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 8, 2, 3);
    struct ggml_tensor *pos = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 3);
    struct ggml_tensor *four = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 12);
    ggml_backend_buffer_t buffer = ggml_backend_cpu_buffer_from_ptr(ggml_get_mem_buffer(ctx), ggml_get_mem_size(ctx));
    pos->buffer = four->buffer = buffer;
    memset(pos->data, 0, ggml_nbytes(pos));
    ggml_set_name(pos, "CPU#inp_pos#0");
    ggml_set_name(four, "inp_pos");
    struct ggml_tensor *rope = ggml_rope(ctx, x, pos, 8, 0), *mrope = ggml_rope(ctx, x, pos, 8, 0);
    mrope->src[1] = four;
    const int32_t want[3] = {5, 900, 901};
    lv_tap *tap = lv_tap_new();
    lv_tap_begin(tap, 3, NULL, NULL, want);
    EXPECT(!lv_tap_eval(rope, true, tap), "a ROPE is not wanted");
    EXPECT(memcmp(pos->data, want, sizeof want) == 0, "positions were not written");
    EXPECT(lv_tap_end(tap) == LV_OK, "positions: %s", lv_tap_error(tap));
    lv_tap_begin(tap, 3, NULL, NULL, want);
    lv_tap_eval(mrope, true, tap);
    EXPECT(lv_tap_end(tap) == LV_E_GRAPH, "four positions a token were accepted");
    lv_tap_begin(tap, 3, NULL, NULL, want);
    EXPECT(lv_tap_end(tap) == LV_E_GRAPH, "positions nobody read were accepted");
    lv_tap_free(tap);
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
}

static void arguments(void) {
    lv_tap *tap = lv_tap_new();
    int32_t image = 0;
    uint8_t rows = LV_ROW_LAST, wrong_rows = 8;
    float out[4];
    EXPECT(lv_tap_begin(tap, 1, NULL, &rows, NULL) == LV_E_ARG, "armed before lv_tap_llm");
    EXPECT(lv_tap_llm(tap, 0, 1) == LV_E_ARG && lv_tap_llm(tap, 1, 0) == LV_E_ARG, "no layers or heads");
    EXPECT(lv_tap_llm(tap, 1025, 1) == LV_E_ARG && lv_tap_llm(tap, 1, 1025) == LV_E_ARG, "too many");
    EXPECT(lv_tap_llm(tap, 1, 2) == LV_OK && lv_tap_reset(tap, 2, 1) == LV_OK, "right ones");
    EXPECT(lv_tap_reset(tap, -1, 0) == LV_E_ARG && lv_tap_reset(tap, INT32_MAX, 0) == LV_E_ARG, "image tokens");
    EXPECT(lv_tap_reset(tap, 1, 8) == LV_E_ARG && lv_tap_error(tap)[0] != '\0', "reductions");
    EXPECT(lv_tap_begin(tap, 0, NULL, NULL, NULL) == LV_E_ARG, "no rows");
    EXPECT(lv_tap_begin(tap, INT32_MAX, NULL, NULL, NULL) == LV_E_ARG, "too many rows");
    image = 2;
    EXPECT(lv_tap_begin(tap, 1, &image, NULL, NULL) == LV_E_ARG, "image index");
    image = -2;
    EXPECT(lv_tap_begin(tap, 1, &image, NULL, NULL) == LV_E_ARG, "negative image index");
    EXPECT(lv_tap_begin(tap, 1, NULL, &wrong_rows, NULL) == LV_E_ARG, "class bits");
    EXPECT(lv_tap_end(tap) == LV_E_ARG && lv_tower_end(tap) == LV_E_ARG, "end without begin");
    EXPECT(lv_tap_read(tap, 0, 0, out, 4) == LV_OK && out[3] == 0.0f, "zeros before any row");
    EXPECT(lv_tap_read(tap, 3, 0, out, 4) == LV_E_ARG && lv_tap_read(tap, -1, 0, out, 4) == LV_E_ARG, "class");
    EXPECT(lv_tap_read(tap, 0, 1, out, 4) == LV_E_ARG && lv_tap_read(tap, 0, 3, out, 4) == LV_E_ARG, "reduction");
    EXPECT(lv_tap_read(tap, 0, 0, out, 3) == LV_E_ARG && lv_tap_read(tap, 0, 0, NULL, 4) == LV_E_ARG, "size");
    EXPECT(lv_tap_rows(tap, 3) < 0 && lv_tap_check(tap, true, 0.0f) == LV_E_ARG, "rows, tolerance");
    EXPECT(lv_tap_threads(tap, 0) == LV_E_ARG && lv_tap_threads(tap, 100000) == LV_OK, "threads");
    EXPECT(lv_tap_begin(NULL, 1, NULL, NULL, NULL) == LV_E_ARG && lv_tap_end(NULL) == LV_E_ARG, "no tap");
    EXPECT(!lv_tap_abort(NULL) && !lv_tap_eval(NULL, true, tap) && lv_tap_eval(NULL, false, tap), "no tensor");
    lv_tap_cancel(NULL);
    lv_tap_free(NULL);
    lv_tap_free(tap);
    EXPECT(lv_tap_guard() == NULL && lv_tap_abi() == LV_TAP_ABI, "guard: %s", lv_tap_guard());
}

static long resident(void) {
    long pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (f != NULL) {
        if (fscanf(f, "%*d %ld", &pages) != 1) {
            pages = 0;
        }
        fclose(f);
    }
    return pages * 4096;
}

/* The tap freed before the context and after it, ten thousand times. */
static void churn(bool measure) {
    struct model *m = model_new(&plain);
    int32_t image[4] = {0, 1, 2, 3};
    uint8_t rows[4] = {0, 0, 1, 5};
    long before = 0;
    for (int i = 0; i < 10000; i++) {
        lv_tap *tap = tap_for(&plain, 0, 1, false);
        lv_tap_begin(tap, 4, image, rows, NULL);
        if (i % 100 == 0) {
            m->n_used = 0;
            struct run *r = run_build(m, &(struct batch){.n = 4, .image = image, .reuse = -1});
            run_compute(m, r, lv_tap_eval, tap);
            EXPECT(lv_tap_end(tap) == LV_OK, "churn: %s", lv_tap_error(tap));
            if (i % 200 == 0) {
                lv_tap_free(tap);
                tap = NULL;
            }
            run_free(m, r);
        }
        lv_tap_free(tap);
        before = i == 1000 ? resident() : before;
    }
    EXPECT(!measure || resident() - before < 1 << 20, "%ld bytes grown", resident() - before);
    model_free(m);
}

int main(int argc, char **argv) {
    find_kernels();
    halves();
    shapes();
    self_check(1, LV_E_CHECK, "layer 0");
    self_check(2, LV_E_CHECK, "layer 0");
    self_check(3, LV_E_GRAPH, "layer 0");
    wrong_graphs();
    cancel();
    disarmed();
    remembered();
    undescribed();
    positions();
    arguments();
    cut_tests();
    stage_tests();
    tower_tests();
    churn(argc > 1 && strcmp(argv[1], "rss") == 0);
    printf("%s, %d failed\n", kernels[n_kernels - 1]->name, failures());
    return failures() == 0 ? 0 : 1;
}
