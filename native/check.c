/* check.c - does softmax(q k) v, as we compute it, reproduce what the node put out? */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tap_internal.h"

#define CELLS 256 /* that a half-precision sum of v runs over without losing more than the tolerance allows */

int lv_tap_check(lv_tap *tap, bool on, float tolerance) {
    if (tap == NULL || (on && !(tolerance > 0.0f))) {
        return LV_E_ARG;
    }
    tap->check = on;
    tap->tolerance = on ? tolerance : tap->tolerance;
    return LV_OK;
}

float lv_tap_check_worst(const lv_tap *tap) { return tap != NULL ? tap->worst : NAN; }

struct check_ctx {
    const struct lv_attn *a;
    float *mix;          /* (n_head, 3 dv): one head's sum of p v, its sum of p |v|, and one row of v */
    double *diff, *size; /* (n_head) largest difference and largest sum of p |v|, which rounding is in proportion to */
};

static void mix_values(void *ctx, const struct lv_block *b) {
    const struct check_ctx *c = ctx;
    const struct lv_attn *a = c->a;
    float *mix = c->mix + (size_t)b->head * 3 * (size_t)a->dv, *bulk = mix + a->dv, *v = bulk + a->dv;
    memset(mix, 0, 2 * (size_t)a->dv * sizeof(float));
    const struct ggml_tensor *values = a->node->src[2];
    const int64_t kv_head = b->head / (a->n_head / values->ne[2]);
    for (int64_t cell = b->first; cell < b->end; cell++) {
        const float p = b->e[cell] * b->w[0];
        if (p == 0.0f) {
            continue; /* hidden cells hold old data, even NaN */
        }
        const char *src = a->v + (size_t)cell * a->v_row + (size_t)kv_head * a->v_head;
        if (a->v_type == GGML_TYPE_F32) {
            memcpy(v, src, (size_t)a->dv * sizeof(float));
        } else {
            a->v_float(src, v, a->dv);
        }
        for (int64_t i = 0; i < a->dv; i++) {
            mix[i] += p * v[i];
            bulk[i] += p * fabsf(v[i]);
        }
    }
    const float *out = (const float *)(a->out + (size_t)b->rows[0] * a->out_row + (size_t)b->head * a->out_head);
    double diff = 0.0, size = 0.0;
    for (int64_t i = 0; i < a->dv; i++) {
        const double d = fabs((double)out[i] - mix[i]);
        diff = d > diff || d != d ? d : diff;
        size = bulk[i] > size ? bulk[i] : size;
    }
    c->diff[b->head] = diff;
    c->size[b->head] = size;
}

static int judge(lv_tap *tap, int layer, int32_t row, double ratio, double allowed) {
    tap->worst = ratio > tap->worst || ratio != ratio ? (float)ratio : tap->worst;
    if (ratio <= allowed) {
        return LV_OK;
    }
    return lv_fail(tap, LV_E_CHECK, "layer %d, row %d: recomputed attention is off by %.3g of the mixed values (%.3g allowed)",
                   layer, row, ratio, allowed);
}

int lv_check_node(lv_tap *tap, const struct lv_attn *attn, int layer, int32_t row) {
    struct lv_attn a = *attn;
    const size_t heads = (size_t)a.n_head;
    struct check_ctx c = {.a = &a, .mix = calloc(heads * 3 * (size_t)a.dv, sizeof(float)),
                          .diff = calloc(heads, sizeof(double)), .size = calloc(heads, sizeof(double))};
    int status = LV_E_MEMORY;
    if (c.mix != NULL && c.diff != NULL && c.size != NULL) {
        status = lv_attn_mask(tap, &a, &row, 1, false);
        status = status == LV_OK ? lv_attn_run(tap, &a, &row, 1, NULL, mix_values, &c) : status;
    }
    double diff = 0.0, size = 0.0;
    for (size_t h = 0; status == LV_OK && h < heads; h++) {
        diff = c.diff[h] > diff || c.diff[h] != c.diff[h] ? c.diff[h] : diff;
        size = c.size[h] > size ? c.size[h] : size;
    }
    free(c.mix);
    free(c.diff);
    free(c.size);
    if (status != LV_OK) {
        return lv_fail(tap, status, "layer %d: no memory for the check", layer);
    }
    const double more = a.n_kv > CELLS ? (double)a.n_kv / CELLS : 1.0;
    return judge(tap, layer, row, diff == 0.0 ? 0.0 : diff / (size > 0.0 ? size : 1.0), more * tap->tolerance);
}

/* Without flash attention the probabilities are read, not recomputed: their sum is all there is to check. */
int lv_check_soft_max(lv_tap *tap, const struct ggml_tensor *node, int layer, int32_t row) {
    const char *data = lv_host(tap, &tap->fetch[5], node, ggml_nbytes(node));
    if (data == NULL || node->type != GGML_TYPE_F32) {
        return lv_fail(tap, LV_E_GRAPH, "layer %d: probabilities cannot be read", layer);
    }
    double worst = 0.0;
    for (int64_t h = 0; h < node->ne[2]; h++) {
        const float *p = (const float *)(data + (size_t)h * node->nb[2] + (size_t)row * node->nb[1]);
        double sum = 0.0;
        for (int64_t c = 0; c < node->ne[0]; c++) {
            sum += p[c];
        }
        const double off = node->src[2] != NULL && sum < 1.0 ? 0.0 : fabs(sum - 1.0); /* sinks take a share */
        worst = off > worst || off != off ? off : worst;
    }
    return judge(tap, layer, row, worst, tap->tolerance);
}
