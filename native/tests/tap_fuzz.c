/* tap_fuzz.c - libFuzzer's bytes as a program: calls of the tap in any order, with any arguments, and graphs that are
 * not shaped as llama.cpp's. `python -m tests.fuzz --target tap` builds it with clang, ASan and UBSan.
 *
 * Graphs stay what ggml guarantees: every tensor's data is as large as its shape says. */
#include <stdlib.h>
#include <string.h>

#include "fixture.h"

#define OPERATIONS 24
#define MOST_IMAGE 4096

struct bytes {
    const uint8_t *data;
    size_t n;
};

static uint32_t below(struct bytes *b, uint32_t n) {
    uint32_t value = 0;
    for (int i = 0; i < 2 && b->n > 0; i++, b->n--) {
        value = value << 8 | *b->data++;
    }
    return value % n;
}

/* Small, negative and huge: what arguments are out of range by. */
static int32_t number(struct bytes *b) {
    static const int32_t odd[] = {-1, 0, 1, 2, 3, 63, 64, 65, 255, 256, 1023, 1024, 1025, 4096, -32768, INT32_MIN, INT32_MAX};
    const uint32_t i = below(b, 40);
    return i < sizeof odd / sizeof *odd ? odd[i] : (int32_t)below(b, 70);
}

static void shape_of(struct bytes *b, struct shape *s) {
    static const enum ggml_type types[] = {GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0};
    s->n_layer = 1 + (int)below(b, 3);
    s->n_head_kv = 1 + (int)below(b, 2);
    s->n_head = s->n_head_kv * (1 + (int)below(b, 3));
    s->d = 32;
    s->scale = 0.2f;
    s->flash = below(b, 3) != 0;
    s->type = types[s->flash ? below(b, 4) : below(b, 2)];
    s->softcap = below(b, 4) == 0 ? 30.0f : 0.0f;
    s->max_bias = below(b, 4) == 0 ? 8.0f : 0.0f;
    s->sinks = below(b, 4) == 0;
    s->sliding = s->n_layer > 1 && below(b, 4) == 0; /* odd layers are the sliding ones */
    s->fill_nan = below(b, 2) == 0;
}

/* A name, an operation, parameters, a smaller shape, a source that is another tensor or none, indices out of range. */
static void spoil(struct run *r, struct bytes *b) {
    const int n = ggml_graph_n_nodes(r->graph);
    struct ggml_tensor *t = ggml_graph_node(r->graph, (int)below(b, (uint32_t)n));
    struct ggml_tensor *other = ggml_graph_node(r->graph, (int)below(b, (uint32_t)n));
    static const char *const names[] = {"", "l_out-0", "l_out-99999", "kq_soft_max-1", "inp_pos", "positions", "patches",
                                        "cache_k_l1", "layer_out-0", "CUDA0#inp_pos#0", "Qcur-2 (view)", "inv_window_idx"};
    static const enum ggml_op ops[] = {GGML_OP_FLASH_ATTN_EXT, GGML_OP_SOFT_MAX, GGML_OP_SET_ROWS, GGML_OP_ROPE,
                                       GGML_OP_GET_ROWS, GGML_OP_ADD, GGML_OP_UNARY, GGML_OP_NONE, GGML_OP_MUL_MAT};
    struct ggml_tensor *const inputs[] = {r->index[0], r->mask[0], r->q[0], r->kcur[0], r->vcur[0], other, NULL};
    switch (below(b, 7)) {
    case 0: ggml_set_name(t, names[below(b, sizeof names / sizeof *names)]); break;
    case 1: t->op = ops[below(b, sizeof ops / sizeof *ops)]; break;
    case 2: t->op_params[below(b, 8)] = number(b); break;
    case 3: t->src[below(b, 5)] = inputs[below(b, sizeof inputs / sizeof *inputs)]; break;
    case 4: { /* smaller, or another way round: what is there is still as large */
        const uint32_t i = below(b, 4);
        t->ne[i] = t->ne[i] > 1 ? 1 + (int64_t)below(b, (uint32_t)t->ne[i]) : t->ne[i];
        break;
    }
    case 5: {
        int64_t cells[MAX_ROWS];
        const int64_t rows = r->index[0]->ne[0];
        for (int64_t i = 0; i < rows; i++) {
            cells[i] = number(b);
        }
        ggml_backend_tensor_set(r->index[0], cells, 0, (size_t)rows * sizeof *cells);
        break;
    }
    default: t->src[0] = t->src[1]; break;
    }
}

static void describe(lv_tap *tap, struct bytes *b, int n, bool valid, int n_image) {
    int32_t image[MAX_ROWS], pos[MAX_ROWS];
    uint8_t rows[MAX_ROWS];
    for (int i = 0; i < MAX_ROWS; i++) {
        image[i] = valid ? (int32_t)below(b, (uint32_t)n_image + 1) - 1 : number(b);
        rows[i] = (uint8_t)below(b, valid ? 8 : 256);
        pos[i] = number(b);
    }
    const int32_t n_rows = valid || number(b) > MAX_ROWS ? n : n - (int32_t)below(b, 3);
    lv_tap_begin(tap, n_rows, below(b, 4) ? image : NULL, below(b, 4) ? rows : NULL, below(b, 3) ? NULL : pos);
}

/* One graph under the tap: run, or only shown to it, spoilt. */
static void graph(struct model *m, lv_tap *tap, struct bytes *b, int n_image) {
    const int n = 1 + (int)below(b, 40);
    struct run *r = run_build(m, &(struct batch){.n = n, .reuse = below(b, 3) == 0 ? (int)below(b, N_CELLS) : -1});
    const int spoilt = (int)below(b, 4);
    describe(tap, b, n, below(b, 3) != 0, n_image);
    float hidden[MAX_ROWS * 4] = {0};
    if (below(b, 4) == 0) {
        const int32_t first = (int32_t)below(b, 3);
        lv_stage(tap, first, number(b), 1 + (int32_t)below(b, 4), first ? hidden : NULL, below(b, 2) == 0);
    } else if (below(b, 4) == 0) {
        lv_tower_begin(tap, number(b), (int32_t)below(b, 100), number(b), (int)below(b, 4), NULL, below(b, 16));
        lv_tower_cut(tap, number(b), below(b, 2) ? hidden : NULL, below(b, MAX_ROWS * 4));
    }
    for (int i = 0; i < spoilt; i++) {
        spoil(r, b);
    }
    if (spoilt == 0) {
        run_compute(m, r, lv_tap_eval, tap);
    } else {
        for (int i = 0; i < ggml_graph_n_nodes(r->graph); i++) {
            struct ggml_tensor *t = ggml_graph_node(r->graph, i);
            if (lv_tap_eval(t, true, tap)) {
                lv_tap_eval(t, false, tap);
            }
        }
    }
    lv_tap_end(tap);
    lv_tower_end(tap);
    run_free(m, r);
}

static void read_all(const lv_tap *tap, struct bytes *b, int n_layer, int n_head, int n_image) {
    const size_t right = (size_t)n_layer * (size_t)n_head * (size_t)n_image;
    const size_t size = below(b, 2) ? right : below(b, 5000);
    float *out = malloc((size > 0 ? size : 1) * sizeof *out);
    int32_t index[64];
    lv_tap_read(tap, number(b), number(b), out, size);
    lv_tap_read(tap, (int32_t)below(b, 3), (int32_t)below(b, 3), out, size);
    lv_tap_rows(tap, number(b));
    lv_stage_read(tap, out, size);
    lv_tower_read(tap, out, size);
    lv_tower_cut_read(tap, out, size);
    lv_tower_window_index(tap, index, below(b, 64));
    lv_tower_repaired(tap);
    lv_tap_error(tap);
    free(out);
}

/* Models are made once for all inputs, and are as new for each. */
static struct model *model_of(const struct shape *s) {
    static struct model *made[256];
    int i = 0;
    while (i < 255 && made[i] != NULL && memcmp(&made[i]->s, s, sizeof *s) != 0) {
        i++;
    }
    if (made[i] != NULL && memcmp(&made[i]->s, s, sizeof *s) != 0) {
        model_free(made[i]);
        made[i] = NULL;
    }
    if (made[i] == NULL) {
        made[i] = model_new(s);
    }
    made[i]->n_used = 0;
    memset(made[i]->holder, -1, sizeof made[i]->holder);
    memset(made[i]->token, -1, sizeof made[i]->token);
    return made[i];
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct bytes b = {data, size};
    struct shape s;
    memset(&s, 0, sizeof s); /* its padding is compared */
    shape_of(&b, &s);
    struct model *m = model_of(&s);
    lv_tap *tap = lv_tap_new();
    int n_layer = s.n_layer, n_head = s.n_head, n_image = 1 + (int)below(&b, MAX_IMAGE);
    tap->copy_always = below(&b, 4) == 0;
    lv_tap_llm(tap, n_layer, n_head);
    lv_tap_reset(tap, n_image, 7);
    for (int i = 0; i < OPERATIONS && b.n > 0; i++) {
        switch (below(&b, 12)) {
        case 0: { /* another model than the graph's */
            const int32_t layers = number(&b), heads = number(&b);
            if (layers < 64 && heads < 64 && lv_tap_llm(tap, layers, heads) == LV_OK) {
                n_layer = layers;
                n_head = heads;
            }
            break;
        }
        case 1: {
            const int32_t wanted = number(&b);
            if (wanted <= MOST_IMAGE && lv_tap_reset(tap, wanted, below(&b, 20)) == LV_OK) {
                n_image = wanted;
            }
            break;
        }
        case 2: lv_tap_forget(tap); break;
        case 3: lv_tap_cancel(tap); break;
        case 4: lv_tap_cancel_reset(tap); break;
        case 5: lv_tap_check(tap, below(&b, 2) == 0, 0.05f); break;
        case 6: lv_tap_cancel_points(tap, below(&b, 2) == 0); break;
        case 7: read_all(tap, &b, n_layer, n_head, n_image); break;
        default: graph(m, tap, &b, n_image); break;
        }
    }
    read_all(tap, &b, n_layer, n_head, n_image);
    lv_tap_free(tap);
    return 0;
}
