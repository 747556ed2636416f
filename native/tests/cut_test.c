/* cut_test.c - the blocks of one encoder run once for two: kept and given rows, graphs that cannot be cut, cancel. */
#include <stdlib.h>
#include <string.h>

#include "fixture.h"
#include "ggml-cpu.h"

#define WIDTH 24
#define OUT 16
#define ROWS 40
#define BLOCKS 3

enum shape_of { PLAIN, WEIGHT_FIRST, WEIGHT_AMID, DEEP, STACKED, COPIED };

/* Name of what COPIED reads behind the cut, as a scheduler makes it for another device. */
static const char *copied = "";

/* An encoder like clip.cpp's: a projector of its own behind blocks that another has as well. */
struct encoder {
    ggml_backend_t backend;
    ggml_backend_sched_t sched;
    struct ggml_context *ctx;
    struct ggml_cgraph *graph;
    struct ggml_tensor *x, *blocks[BLOCKS], *outs[BLOCKS], *projector, *before, *out;
};

static struct ggml_tensor *input(struct encoder *e, int64_t n0, int64_t n1) {
    struct ggml_tensor *t = ggml_new_tensor_2d(e->ctx, GGML_TYPE_F32, n0, n1);
    ggml_set_input(t);
    ggml_set_output(t);
    return t;
}

static void fill(struct ggml_tensor *t) {
    float data[WIDTH * ROWS];
    for (int64_t i = 0; i < ggml_nelements(t); i++) {
        data[i] = random_unit();
    }
    ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
}

static struct ggml_tensor *run_blocks(struct encoder *e, enum shape_of shape) {
    struct ggml_tensor *cur = e->before = ggml_scale(e->ctx, e->x, 0.5f);
    ggml_set_name(cur, "pos_embed");
    ggml_set_output(cur);
    for (int il = 0; il < BLOCKS; il++) {
        struct ggml_tensor *inner = ggml_norm(e->ctx, cur, 1e-5f);
        ggml_format_name(inner, "layer_inp_normed-%d", il);
        inner = ggml_mul_mat(e->ctx, e->blocks[il], ggml_reshape_2d(e->ctx, inner, WIDTH, ROWS));
        cur = ggml_add(e->ctx, cur, inner);
        ggml_format_name(cur, "layer_out-%d", il);
        ggml_set_output(cur); /* its memory is not used again, so that a test sees whether it was written */
        e->outs[il] = cur;
        if (shape == WEIGHT_AMID && il == 0) { /* Gemma 3: clip.cpp puts all but the last block into the graph first */
            ggml_build_forward_expand(e->graph, cur);
        }
    }
    return cur;
}

static struct encoder *encoder_new(enum shape_of shape) {
    struct encoder *e = calloc(1, sizeof *e);
    e->backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(e->backend, 1);
    e->sched = ggml_backend_sched_new(&e->backend, NULL, 1, 256, false, false);
    e->ctx = ggml_init((struct ggml_init_params){.mem_size = 128 * ggml_tensor_overhead() + ggml_graph_overhead(),
                                                 .no_alloc = true});
    e->graph = ggml_new_graph(e->ctx);
    e->x = input(e, WIDTH, ROWS);
    for (int il = 0; il < BLOCKS; il++) {
        e->blocks[il] = input(e, WIDTH, WIDTH);
    }
    const bool turned = shape == WEIGHT_FIRST || shape == WEIGHT_AMID;
    e->projector = turned ? input(e, OUT, WIDTH) : input(e, WIDTH, OUT);
    struct ggml_tensor *cur = run_blocks(e, shape), *weight = e->projector;
    if (turned) { /* computed before the cut, and used behind it */
        weight = ggml_cont(e->ctx, ggml_transpose(e->ctx, weight));
    } else if (shape == DEEP) { /* Qwen3-VL: what an earlier block gave comes in later */
        cur = ggml_add(e->ctx, cur, ggml_reshape_2d(e->ctx, e->outs[0], WIDTH, ROWS));
    } else if (shape == STACKED) { /* Granite: several blocks' outputs put together on the way */
        cur = ggml_add(e->ctx, ggml_add(e->ctx, e->outs[0], e->outs[1]), cur);
    }
    if (shape == COPIED) {
        cur = ggml_add(e->ctx, cur, ggml_set_name(input(e, WIDTH, ROWS), copied));
    }
    e->out = ggml_mul_mat(e->ctx, weight, ggml_reshape_2d(e->ctx, cur, WIDTH, ROWS));
    ggml_set_output(e->out);
    ggml_build_forward_expand(e->graph, e->out);
    if (!ggml_backend_sched_alloc_graph(e->sched, e->graph)) {
        abort();
    }
    fill(e->x);
    fill(e->projector);
    for (int il = 0; il < BLOCKS; il++) {
        fill(e->blocks[il]);
    }
    return e;
}

static void encoder_free(struct encoder *e) {
    ggml_backend_sched_free(e->sched);
    ggml_free(e->ctx);
    ggml_backend_free(e->backend);
    free(e);
}

static void compute(struct encoder *e, lv_tap *tap) {
    ggml_backend_sched_set_eval_callback(e->sched, lv_tap_eval, tap);
    ggml_backend_sched_graph_compute(e->sched, e->graph);
}

/* One run that is cut after the last block, or after `layer`. */
static int run_cut(struct encoder *e, lv_tap *tap, int layer, const float *rows, size_t size) {
    int status = lv_tower_begin(tap, BLOCKS, ROWS, 0, LV_TOWER_OFF, NULL, 0);
    if (status == LV_OK) {
        status = lv_tower_cut(tap, layer, rows, size);
    }
    compute(e, tap);
    const int end = lv_tower_end(tap);
    for (int i = 0; i < ggml_graph_n_nodes(e->graph); i++) {
        EXPECT((ggml_graph_node(e->graph, i)->flags & GGML_TENSOR_FLAG_COMPUTE) != 0, "node %d lost its flag", i);
    }
    return status != LV_OK ? status : end;
}

static void read(const struct ggml_tensor *t, float *out) { ggml_backend_tensor_get(t, out, 0, ggml_nbytes(t)); }

/* The second encoder has another picture and another projector, so that only rows that were given explain its output. */
static void takes_over(enum shape_of shape, bool copy) {
    struct encoder *first = encoder_new(shape), *second = encoder_new(shape);
    lv_tap *tap = lv_tap_new(), *other = lv_tap_new();
    tap->copy_always = other->copy_always = copy;
    float whole[OUT * ROWS], plain[OUT * ROWS], got[OUT * ROWS], rows[WIDTH * ROWS], same[WIDTH * ROWS], short_[8];
    compute(first, NULL);
    read(first->out, plain);
    EXPECT(run_cut(first, tap, BLOCKS - 1, NULL, 0) == LV_OK, "keep: %s", lv_tap_error(tap));
    read(first->out, whole);
    EXPECT(memcmp(plain, whole, sizeof plain) == 0, "a run that keeps rows gives something else");
    EXPECT(lv_tower_cut_read(tap, NULL, 0) == WIDTH * ROWS, "%lld floats", (long long)lv_tower_cut_read(tap, NULL, 0));
    lv_tower_cut_read(tap, rows, WIDTH * ROWS);
    read(first->outs[BLOCKS - 1], same);
    EXPECT(memcmp(rows, same, sizeof rows) == 0, "other rows were kept");
    EXPECT(lv_tower_cut_read(tap, short_, 8) == WIDTH * ROWS && memcmp(short_, rows, sizeof short_) == 0, "the first 8");

    float projector[WIDTH * OUT], marks[WIDTH * ROWS], now[WIDTH * ROWS], before[WIDTH * ROWS];
    read(first->projector, projector);
    ggml_backend_tensor_set(second->projector, projector, 0, sizeof projector);
    for (int i = 0; i < WIDTH * ROWS; i++) {
        marks[i] = 12345.0f;
    }
    for (int il = 0; il < BLOCKS; il++) {
        ggml_backend_tensor_set(second->outs[il], marks, 0, sizeof marks);
    }
    EXPECT(run_cut(second, other, BLOCKS - 1, rows, WIDTH * ROWS) == LV_OK, "give: %s", lv_tap_error(other));
    read(second->out, got);
    EXPECT(memcmp(got, whole, sizeof got) == 0, "the projector's rows differ");
    EXPECT(lv_tower_cut_read(other, NULL, 0) == 0, "a run that was given rows keeps none");
    for (int il = 0; il + 1 < BLOCKS; il++) {
        read(second->outs[il], now);
        EXPECT(memcmp(now, marks, sizeof now) == 0, "block %d ran", il);
    }
    read(second->x, now);
    read(second->before, before);
    EXPECT(before[7] == 0.5f * now[7], "what lies before the blocks did not run");

    compute(second, NULL);
    read(second->out, plain);
    EXPECT(run_cut(second, other, BLOCKS - 1, NULL, 0) == LV_OK, "whole again: %s", lv_tap_error(other));
    read(second->out, got);
    EXPECT(memcmp(got, plain, sizeof got) == 0 && memcmp(got, whole, sizeof got) != 0, "the next run is not whole");
    lv_tap_free(tap);
    lv_tap_free(other);
    encoder_free(first);
    encoder_free(second);
}

static void cannot_be_cut(enum shape_of shape) {
    struct encoder *e = encoder_new(shape);
    lv_tap *tap = lv_tap_new();
    float plain[OUT * ROWS], got[OUT * ROWS], rows[WIDTH * ROWS] = {0};
    compute(e, NULL);
    read(e->out, plain);
    EXPECT(run_cut(e, tap, BLOCKS - 1, NULL, 0) == LV_OK, "keep: %s", lv_tap_error(tap));
    EXPECT(lv_tower_cut_read(tap, rows, WIDTH * ROWS) == 0, "rows of a graph that cannot be cut");
    read(e->out, got);
    EXPECT(memcmp(got, plain, sizeof got) == 0, "the run is not whole");
    EXPECT(run_cut(e, tap, BLOCKS - 1, rows, WIDTH * ROWS) == LV_E_GRAPH, "give: %s", lv_tap_error(tap));
    EXPECT(strstr(lv_tap_error(tap), "layer_out-2") != NULL, "%s", lv_tap_error(tap));
    lv_tap_free(tap);
    encoder_free(e);
}

static void copies(void) {
    static const char *const lost[] = {"GPU1#layer_out-0#0", "GPU1#layer_inp_normed-2 (reshaped)#0"};
    static const char *const there[] = {"GPU1#layer_out-2#0", "GPU1#layer_out-22#0", "GPU1#pos_embed#0", "layer_out-0"};
    for (size_t i = 0; i < sizeof lost / sizeof lost[0]; i++) {
        copied = lost[i];
        cannot_be_cut(COPIED);
    }
    for (size_t i = 0; i < sizeof there / sizeof there[0]; i++) {
        copied = there[i];
        struct encoder *e = encoder_new(COPIED);
        lv_tap *tap = lv_tap_new();
        EXPECT(run_cut(e, tap, BLOCKS - 1, NULL, 0) == LV_OK && lv_tower_cut_read(tap, NULL, 0) == WIDTH * ROWS,
               "'%s': %s", copied, lv_tap_error(tap));
        lv_tap_free(tap);
        encoder_free(e);
    }
}

static void refusals(void) {
    struct encoder *e = encoder_new(PLAIN);
    lv_tap *tap = lv_tap_new();
    float rows[WIDTH * ROWS] = {0}, plain[OUT * ROWS], got[OUT * ROWS];
    compute(e, NULL);
    read(e->out, plain);
    EXPECT(lv_tower_cut(NULL, 0, NULL, 0) == LV_E_ARG && lv_tower_cut_read(NULL, NULL, 0) == LV_E_ARG, "no tap");
    EXPECT(lv_tower_cut(tap, 0, NULL, 0) == LV_E_ARG, "not in a run");
    EXPECT(run_cut(e, tap, -1, NULL, 0) == LV_E_ARG && run_cut(e, tap, 1024, NULL, 0) == LV_E_ARG, "block");
    EXPECT(run_cut(e, tap, 0, rows, 0) == LV_E_ARG && run_cut(e, tap, 0, NULL, 8) == LV_E_ARG, "rows and size");
    EXPECT(run_cut(e, tap, BLOCKS, rows, 8) == LV_E_GRAPH, "a block that is not there: %s", lv_tap_error(tap));
    EXPECT(run_cut(e, tap, BLOCKS, NULL, 0) == LV_OK && lv_tower_cut_read(tap, rows, 8) == 0, "nor kept");
    EXPECT(run_cut(e, tap, BLOCKS - 1, rows, 8) == LV_E_GRAPH, "another size: %s", lv_tap_error(tap));
    EXPECT(lv_tower_begin(tap, BLOCKS, ROWS, 0, LV_TOWER_RECEIVED, NULL, 0) == LV_OK, "begin");
    EXPECT(lv_tower_cut(tap, BLOCKS - 1, rows, WIDTH * ROWS) == LV_E_ARG, "attention of blocks that do not run");
    for (int given = 0; given < 2; given++) {
        lv_tap_cancel(tap);
        EXPECT(run_cut(e, tap, BLOCKS - 1, given ? rows : NULL, given ? WIDTH * ROWS : 0) == LV_E_CANCELLED, "cancel");
        EXPECT(lv_tower_cut_read(tap, NULL, 0) == 0, "rows of a cancelled run");
        lv_tap_cancel_reset(tap);
    }
    EXPECT(lv_tower_begin(tap, BLOCKS, ROWS, 0, LV_TOWER_OFF, NULL, 0) == LV_OK, "begin");
    compute(e, tap);
    EXPECT(lv_tower_end(tap) == LV_OK && lv_tower_cut_read(tap, NULL, 0) == 0, "a run without a cut");
    read(e->out, got);
    EXPECT(memcmp(got, plain, sizeof got) == 0, "a run after those is not whole");
    lv_tap_free(tap);
    encoder_free(e);
}

/* Cancelled at a node in the middle: of the blocks that are left out, and of what comes behind them. */
struct late {
    lv_tap *tap;
    const struct ggml_tensor *at;
};

static bool cancel_late(struct ggml_tensor *t, bool ask, void *data) {
    const struct late *late = data;
    if (ask && t == late->at) {
        lv_tap_cancel(late->tap);
    }
    return lv_tap_eval(t, ask, late->tap);
}

static void cancelled_midway(void) {
    struct encoder *e = encoder_new(PLAIN);
    lv_tap *tap = lv_tap_new();
    float rows[WIDTH * ROWS] = {0};
    const struct ggml_tensor *at[] = {e->outs[1], e->outs[BLOCKS - 1], e->out};
    for (int i = 0; i < 6; i++) {
        struct late late = {tap, at[i / 2]};
        lv_tower_begin(tap, BLOCKS, ROWS, 0, LV_TOWER_OFF, NULL, 0);
        lv_tower_cut(tap, BLOCKS - 1, i % 2 ? rows : NULL, i % 2 ? WIDTH * ROWS : 0);
        ggml_backend_sched_set_eval_callback(e->sched, cancel_late, &late);
        ggml_backend_sched_graph_compute(e->sched, e->graph);
        EXPECT(lv_tower_end(tap) == LV_E_CANCELLED && lv_tower_cut_read(tap, NULL, 0) == 0, "cancelled, %d", i);
        for (int j = 0; j < ggml_graph_n_nodes(e->graph); j++) {
            EXPECT((ggml_graph_node(e->graph, j)->flags & GGML_TENSOR_FLAG_COMPUTE) != 0, "node %d lost its flag", j);
        }
        lv_tap_cancel_reset(tap);
    }
    lv_tap_free(tap);
    encoder_free(e);
}

void cut_tests(void) {
    takes_over(PLAIN, false);
    takes_over(WEIGHT_FIRST, true);
    takes_over(WEIGHT_AMID, false);
    cannot_be_cut(DEEP);
    cannot_be_cut(STACKED);
    copies();
    refusals();
    cancelled_midway();
}
