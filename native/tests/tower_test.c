/* tower_test.c - the vision encoder: CLS and received attention, window masks, repairs, cancel. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fixture.h"
#include "ggml-cpu.h"

#define N_PATCHES 70
#define N_POS 71
#define HEADS 4
#define DIM 32
#define LAYERS 3

struct tower {
    ggml_backend_t backend;
    ggml_backend_sched_t sched;
    struct ggml_context *ctx;
    struct ggml_cgraph *graph;
    struct ggml_tensor *q[LAYERS], *k[LAYERS], *v[LAYERS], *mask, *table, *positions, *patches, *window, *picked, *weight, *placed, *gelu;
    float hidden[N_POS][N_POS]; /* mask values */
};

static struct ggml_tensor *named(struct ggml_tensor *t, const char *name, int il) {
    ggml_set_input(t);
    ggml_set_output(t); /* its memory is not used again: the graph may run twice, and is compared afterwards */
    ggml_format_name(t, il >= 0 ? "%s-%d" : "%s", name, il);
    return t;
}

/* clip.cpp's build_attn */
static struct ggml_tensor *block(struct tower *t, int il, bool flash) {
    struct ggml_tensor *in[3];
    const char *names[3] = {"Qcur", il == 1 ? "Kcur_rope" : "Kcur", "Vcur"};
    struct ggml_tensor **keep[3] = {t->q, t->k, t->v};
    for (int i = 0; i < 3; i++) {
        in[i] = keep[i][il] = named(ggml_new_tensor_3d(t->ctx, GGML_TYPE_F32, DIM, HEADS, N_POS), names[i], il);
        in[i] = ggml_permute(t->ctx, in[i], 0, 2, 1, 3);
    }
    struct ggml_tensor *mask = il == 2 ? NULL : t->mask; /* the last block sees everything */
    if (flash) {
        mask = mask != NULL ? ggml_cast(t->ctx, mask, GGML_TYPE_F16) : NULL;
        return ggml_flash_attn_ext(t->ctx, in[0], ggml_cast(t->ctx, in[1], GGML_TYPE_F16),
                                   ggml_cast(t->ctx, in[2], GGML_TYPE_F16), mask, 0.2f, 0.0f, 0.0f);
    }
    struct ggml_tensor *kq = ggml_soft_max_ext(t->ctx, ggml_mul_mat(t->ctx, in[1], in[0]), mask, 0.2f, 0.0f);
    return ggml_mul_mat(t->ctx, ggml_cont(t->ctx, ggml_transpose(t->ctx, in[2])), kq);
}

static void fill(struct ggml_tensor *t) {
    float *data = malloc(ggml_nbytes(t));
    for (int64_t i = 0; i < ggml_nelements(t); i++) {
        data[i] = 2.0f * random_unit();
    }
    ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
    free(data);
}

static void fill_inputs(struct tower *t) {
    for (int i = 0; i < N_POS; i++) {
        for (int j = 0; j < N_POS; j++) { /* windows of 8 rows */
            t->hidden[i][j] = i / 8 == j / 8 ? 0.0f : -INFINITY;
        }
    }
    ggml_backend_tensor_set(t->mask, t->hidden, 0, sizeof t->hidden);
    int32_t raster[N_POS], window[N_PATCHES];
    for (int i = 0; i < N_POS; i++) {
        raster[i] = i;
    }
    for (int i = 0; i < N_PATCHES; i++) {
        window[i] = (7 * i) % N_PATCHES == 0 ? i : N_PATCHES - 1 - i;
    }
    ggml_backend_tensor_set(t->positions, raster, 0, sizeof raster);
    ggml_backend_tensor_set(t->patches, raster + 1, 0, sizeof window); /* as llama.cpp fills it: 1..N */
    ggml_backend_tensor_set(t->window, window, 0, sizeof window);
    fill(t->table);
    fill(t->weight);
    for (int il = 0; il < LAYERS; il++) {
        fill(t->q[il]);
        fill(t->k[il]);
        fill(t->v[il]);
    }
}

static struct tower *tower_new(bool flash) {
    struct tower *t = calloc(1, sizeof *t);
    t->backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(t->backend, 1);
    t->sched = ggml_backend_sched_new(&t->backend, NULL, 1, 512, false, false);
    t->ctx = ggml_init((struct ggml_init_params){.mem_size = 256 * ggml_tensor_overhead() + ggml_graph_overhead(),
                                                 .no_alloc = true});
    t->graph = ggml_new_graph(t->ctx);
    t->mask = named(ggml_new_tensor_2d(t->ctx, GGML_TYPE_F32, N_POS, N_POS), "window_mask", -1);
    t->table = named(ggml_new_tensor_2d(t->ctx, GGML_TYPE_F32, 4, N_POS), "table", -1);
    t->weight = named(ggml_new_tensor_2d(t->ctx, GGML_TYPE_F32, 4, N_POS), "v.position_embd.weight", -1);
    t->positions = named(ggml_new_tensor_1d(t->ctx, GGML_TYPE_I32, N_POS), "positions", -1);
    t->patches = named(ggml_new_tensor_1d(t->ctx, GGML_TYPE_I32, N_PATCHES), "patches", -1);
    t->window = named(ggml_new_tensor_1d(t->ctx, GGML_TYPE_I32, N_PATCHES), "inv_window_idx", -1);
    struct ggml_tensor *x = ggml_get_rows(t->ctx, t->table, t->positions);
    t->placed = ggml_add(t->ctx, x, t->weight);
    ggml_set_name(t->placed, "pos_embed");
    ggml_set_output(t->placed);
    ggml_build_forward_expand(t->graph, t->placed);
    t->gelu = ggml_gelu_quick(t->ctx, t->placed);
    ggml_set_output(t->gelu);
    ggml_build_forward_expand(t->graph, t->gelu);
    for (int il = 0; il < LAYERS; il++) {
        struct ggml_tensor *out = ggml_scale(t->ctx, block(t, il, flash), 1.0f);
        ggml_format_name(out, "layer_out-%d", il);
        ggml_set_output(out);
        ggml_build_forward_expand(t->graph, out);
    }
    ggml_build_forward_expand(t->graph, ggml_get_rows(t->ctx, x, t->window));
    t->picked = ggml_get_rows(t->ctx, x, t->patches);
    ggml_set_output(t->picked);
    ggml_build_forward_expand(t->graph, t->picked);
    if (!ggml_backend_sched_alloc_graph(t->sched, t->graph)) {
        abort();
    }
    fill_inputs(t);
    return t;
}

static void tower_free(struct tower *t) {
    ggml_backend_sched_free(t->sched);
    ggml_free(t->ctx);
    ggml_backend_free(t->backend);
    free(t);
}

static int compute(struct tower *t, lv_tap *tap) {
    ggml_backend_sched_set_eval_callback(t->sched, lv_tap_eval, tap);
    return (int)ggml_backend_sched_graph_compute(t->sched, t->graph);
}

static void exact_row(const struct tower *t, int il, int head, int row, double *p) {
    float scores[N_POS];
    const char *q = (const char *)t->q[il]->data + (size_t)row * t->q[il]->nb[2] + (size_t)head * t->q[il]->nb[1];
    for (int c = 0; c < N_POS; c++) {
        const char *k = (const char *)t->k[il]->data + (size_t)c * t->k[il]->nb[2] + (size_t)head * t->k[il]->nb[1];
        double dot = 0.0;
        for (int i = 0; i < DIM; i++) {
            dot += (double)((const float *)q)[i] * ((const float *)k)[i];
        }
        scores[c] = (float)(0.2f * dot);
    }
    exact_softmax(scores, il == 2 ? NULL : t->hidden[row], 1.0f, N_POS, NULL, p);
}

static void expected(const struct tower *t, int mode, int cls_row, double out[LAYERS][N_PATCHES]) {
    for (int il = 0; il < LAYERS; il++) {
        memset(out[il], 0, sizeof out[il]);
        for (int head = 0; head < HEADS; head++) {
            const int first = mode == LV_TOWER_CLS ? cls_row : 0, end = mode == LV_TOWER_CLS ? cls_row + 1 : N_POS;
            for (int row = first; row < end; row++) {
                double p[N_POS];
                exact_row(t, il, head, row, p);
                for (int c = 0; c < N_PATCHES; c++) {
                    out[il][c] += p[c] / HEADS / (end - first);
                }
            }
        }
    }
}

static void read_mode(bool flash, int mode, int threads, bool copy) {
    struct tower *t = tower_new(flash);
    lv_tap *tap = lv_tap_new();
    lv_tap_threads(tap, threads);
    tap->copy_always = copy;
    const uint8_t layers[LAYERS] = {1, 0, 1};
    const bool all = threads > 1;
    const int cls_row = N_POS - 5;
    EXPECT(lv_tower_begin(tap, LAYERS, N_PATCHES, cls_row, mode, all ? NULL : layers, 0) == LV_OK, "begin");
    EXPECT(compute(t, tap) == 0 && lv_tower_end(tap) == LV_OK, "tower: %s", lv_tap_error(tap));
    float got[LAYERS][N_PATCHES];
    double want[LAYERS][N_PATCHES];
    EXPECT(lv_tower_read(tap, got[0], LAYERS * N_PATCHES) == LV_OK, "read");
    expected(t, mode, cls_row, want);
    for (int il = 0; il < LAYERS; il++) {
        double worst = 0.0, top = 0.0;
        for (int c = 0; c < N_PATCHES; c++) {
            worst = fmax(worst, fabs(got[il][c] - want[il][c]));
            top = fmax(top, want[il][c]);
        }
        const bool read = all || layers[il] != 0;
        EXPECT(read ? worst < 3e-3 * top : isnan(got[il][0]), "mode %d flash %d layer %d: off by %g of %g", mode, flash,
               il, worst, top);
    }
    int32_t window[N_PATCHES], real[N_PATCHES];
    ggml_backend_tensor_get(t->window, real, 0, sizeof real);
    EXPECT(lv_tower_window_index(tap, window, N_PATCHES) == N_PATCHES && memcmp(window, real, sizeof real) == 0,
           "window index");
    EXPECT(lv_tower_repaired(tap) == 0, "nothing was to be repaired");
    lv_tap_free(tap);
    tower_free(t);
}

static void repair(void) {
    struct tower *t = tower_new(true);
    lv_tap *tap = lv_tap_new();
    EXPECT(lv_tower_begin(tap, LAYERS, N_PATCHES, 0, LV_TOWER_OFF, NULL, LV_REPAIR_LLAVA_CLS) == LV_OK, "begin");
    compute(t, tap);
    EXPECT(lv_tower_end(tap) == LV_OK, "repair: %s", lv_tap_error(tap));
    EXPECT(lv_tower_repaired(tap) == LV_REPAIR_LLAVA_CLS, "repaired %u", lv_tower_repaired(tap));
    /* patch i of the result must hold row i + 1 of the table: position i + 1, picked as row i */
    float picked[N_PATCHES][4], table[N_POS][4];
    ggml_backend_tensor_get(t->picked, picked, 0, sizeof picked);
    ggml_backend_tensor_get(t->table, table, 0, sizeof table);
    EXPECT(memcmp(picked, table[1], sizeof picked) == 0, "patches have the wrong positions");
    EXPECT(lv_tower_begin(tap, LAYERS, N_PATCHES + 1, 0, LV_TOWER_OFF, NULL, LV_REPAIR_LLAVA_CLS) == LV_OK, "begin");
    compute(t, tap);
    EXPECT(lv_tower_end(tap) == LV_E_GRAPH, "a repair that does not fit: %s", lv_tap_error(tap));
    lv_tap_free(tap);
    tower_free(t);
}

/* One run: row i must get row i + 1 of the weight if positions are repaired, the last row 0; the weight stays. */
static void place(struct tower *t, lv_tap *tap, uint32_t repairs, float weight[N_POS][4]) {
    float after[N_POS][4], raster[N_POS][4], placed[N_POS][4];
    EXPECT(lv_tower_begin(tap, LAYERS, N_PATCHES, 0, LV_TOWER_OFF, NULL, repairs) == LV_OK, "begin");
    compute(t, tap);
    EXPECT(lv_tower_end(tap) == LV_OK && lv_tower_repaired(tap) == repairs, "repaired %u: %s", lv_tower_repaired(tap),
           lv_tap_error(tap));
    ggml_backend_tensor_get(t->weight, after, 0, sizeof after);
    EXPECT(memcmp(weight, after, sizeof after) == 0, "the weight is not as it was");
    ggml_backend_tensor_get(t->table, raster, 0, sizeof raster);
    ggml_backend_tensor_get(t->placed, placed, 0, sizeof placed);
    int wrong = 0;
    for (int i = 0; i < N_POS; i++) {
        for (int c = 0; c < 4; c++) {
            wrong += placed[i][c] != raster[i][c] + weight[(i + (repairs != 0)) % N_POS][c];
        }
    }
    EXPECT(wrong == 0, "repairs %u: %d wrong", repairs, wrong);
}

static void positions(bool copy) {
    struct tower *t = tower_new(true);
    lv_tap *tap = lv_tap_new();
    tap->copy_always = copy;
    float weight[N_POS][4], after[N_POS][4];
    ggml_backend_tensor_get(t->weight, weight, 0, sizeof weight);
    const uint32_t repairs[] = {LV_REPAIR_POSITIONS, LV_REPAIR_POSITIONS, LV_REPAIR_NONE};
    for (int i = 0; i < 3; i++) {
        place(t, tap, repairs[i], weight);
    }
    for (int i = 0; i < 2; i++) {
        EXPECT(lv_tower_begin(tap, LAYERS, N_PATCHES, 0, LV_TOWER_OFF, NULL, LV_REPAIR_POSITIONS) == LV_OK, "begin");
        compute(t, tap); /* and never ended */
        place(t, tap, repairs[2 * i], weight);
    }
    EXPECT(lv_tower_begin(tap, LAYERS, N_PATCHES - 1, 0, LV_TOWER_OFF, NULL, LV_REPAIR_POSITIONS) == LV_OK, "begin");
    compute(t, tap);
    EXPECT(lv_tower_end(tap) == LV_E_GRAPH && lv_tower_repaired(tap) == 0, "a table that does not fit: %s",
           lv_tap_error(tap));
    ggml_backend_tensor_get(t->weight, after, 0, sizeof after);
    EXPECT(memcmp(weight, after, sizeof after) == 0, "the weight is not as it was");
    lv_tap_free(tap);
    tower_free(t);
}

static void gelu(void) {
    struct tower *t = tower_new(true);
    lv_tap *tap = lv_tap_new();
    const uint32_t repairs[] = {LV_REPAIR_NONE, LV_REPAIR_GELU};
    for (int i = 0; i < 2; i++) {
        float in[N_POS * 4], out[N_POS * 4], worst[2] = {0.0f, 0.0f}; /* from the quick and from the tanh form */
        EXPECT(lv_tower_begin(tap, LAYERS, N_PATCHES, 0, LV_TOWER_OFF, NULL, repairs[i]) == LV_OK, "begin");
        compute(t, tap);
        EXPECT(lv_tower_end(tap) == LV_OK && lv_tower_repaired(tap) == repairs[i], "repaired %u", lv_tower_repaired(tap));
        ggml_backend_tensor_get(t->placed, in, 0, sizeof in);
        ggml_backend_tensor_get(t->gelu, out, 0, sizeof out);
        for (int j = 0; j < N_POS * 4; j++) {
            const float x = in[j], wave = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
            worst[0] = fmaxf(worst[0], fabsf(out[j] - x / (1.0f + expf(-1.702f * x))));
            worst[1] = fmaxf(worst[1], fabsf(out[j] - 0.5f * x * (1.0f + wave)));
        }
        EXPECT(worst[i] < 4e-3f && worst[1 - i] > 1e-2f, "repairs %u: off by %g and %g", repairs[i], worst[0], worst[1]);
    }
    lv_tap_free(tap);
    tower_free(t);
}

static void refusals(void) {
    struct tower *t = tower_new(true);
    lv_tap *tap = lv_tap_new();
    EXPECT(lv_tower_begin(tap, 1025, 1, 0, LV_TOWER_CLS, NULL, 0) == LV_E_ARG, "layers");
    EXPECT(lv_tower_begin(tap, 1, -1, 0, LV_TOWER_CLS, NULL, 0) == LV_E_ARG, "patches");
    EXPECT(lv_tower_begin(tap, 1, 1, -1, LV_TOWER_CLS, NULL, 0) == LV_E_ARG, "CLS row");
    EXPECT(lv_tower_begin(tap, 1, 1, 0, 3, NULL, 0) == LV_E_ARG, "mode");
    EXPECT(lv_tower_begin(tap, 1, 1, 0, 0, NULL, 8) == LV_E_ARG, "repair");
    EXPECT(lv_tower_begin(tap, 0, 0, 0, LV_TOWER_OFF, NULL, 0) == LV_OK && lv_tower_end(tap) == LV_OK, "off");
    EXPECT(lv_tower_begin(tap, LAYERS, N_PATCHES, N_POS, LV_TOWER_CLS, NULL, 0) == LV_OK, "begin");
    compute(t, tap);
    EXPECT(lv_tower_end(tap) == LV_E_GRAPH, "a CLS row that is not there");
    EXPECT(lv_tower_begin(tap, LAYERS, N_POS + 1, 0, LV_TOWER_RECEIVED, NULL, 0) == LV_OK, "begin");
    compute(t, tap);
    EXPECT(lv_tower_end(tap) == LV_E_GRAPH, "more patches than rows");
    EXPECT(lv_tower_begin(tap, LAYERS, N_PATCHES, 0, LV_TOWER_RECEIVED, NULL, 0) == LV_OK, "begin");
    lv_tap_cancel(tap);
    compute(t, tap);
    EXPECT(lv_tower_end(tap) == LV_E_CANCELLED, "cancelled");
    lv_tap_cancel_reset(tap);
    for (int i = 0; i < ggml_graph_n_nodes(t->graph); i++) {
        EXPECT((ggml_graph_node(t->graph, i)->flags & GGML_TENSOR_FLAG_COMPUTE) != 0, "node %d lost its flag", i);
    }
    EXPECT(lv_tower_read(tap, NULL, 0) == LV_E_ARG, "read into nothing");
    lv_tap_free(tap);
    tower_free(t);
}

void tower_tests(void) {
    for (int flash = 0; flash < 2; flash++) {
        for (int mode = LV_TOWER_CLS; mode <= LV_TOWER_RECEIVED; mode++) {
            read_mode(flash != 0, mode, 1, false);
            read_mode(flash != 0, mode, 3, true);
        }
    }
    repair();
    positions(false);
    positions(true);
    gelu();
    refusals();
}
