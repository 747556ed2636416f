/* fixture.c - see fixture.h */
#include "fixture.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ggml-alloc.h"
#include "ggml-cpu.h"

static int failed;
static uint64_t state = 88172645463325252u;

int failures(void) { return failed; }

void expect_at(bool ok, const char *file, int line, const char *format, ...) {
    if (ok) {
        return;
    }
    failed++;
    va_list args;
    va_start(args, format);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
}

static uint64_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

float random_unit(void) { return (float)(next() >> 40) / (float)(1 << 23) - 1.0f; }
uint32_t random_below(uint32_t n) { return (uint32_t)(next() >> 33) % n; }

static int cache_of(const struct model *m, int layer) { return m->s.sliding && layer % 2 == 1 ? 1 : 0; }

static void fill_cache(const struct model *m, struct ggml_tensor *t) {
    const size_t size = ggml_nbytes(t);
    uint8_t *bytes = calloc(1, size);
    if (m->s.fill_nan && t->type == GGML_TYPE_F16) {
        for (size_t i = 0; i < size / 2; i++) {
            ((uint16_t *)bytes)[i] = 0x7e00;
        }
    } else if (m->s.fill_nan && t->type == GGML_TYPE_F32) {
        for (size_t i = 0; i < size / 4; i++) {
            ((float *)bytes)[i] = NAN;
        }
    }
    ggml_backend_tensor_set(t, bytes, 0, size);
    free(bytes);
}

static void shuffle(int32_t *order) {
    for (int i = 0; i < N_CELLS; i++) {
        order[i] = i;
    }
    for (int i = N_CELLS - 1; i > 0; i--) {
        const uint32_t j = random_below((uint32_t)i + 1);
        const int32_t t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
}

struct model *model_new(const struct shape *s) {
    struct model *m = calloc(1, sizeof *m);
    m->s = *s;
    m->backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(m->backend, 1);
    m->sched = ggml_backend_sched_new(&m->backend, NULL, 1, 512, false, false);
    m->memory = ggml_init((struct ggml_init_params){.mem_size = 64 * ggml_tensor_overhead(), .no_alloc = true});
    const int64_t width = (int64_t)s->d * s->n_head_kv;
    for (int il = 0; il < s->n_layer; il++) {
        m->k[il] = ggml_new_tensor_3d(m->memory, s->type, width, N_CELLS, 1);
        m->v[il] = ggml_new_tensor_3d(m->memory, s->flash ? GGML_TYPE_F16 : GGML_TYPE_F32, width, N_CELLS, 1);
        m->sinks[il] = ggml_new_tensor_1d(m->memory, GGML_TYPE_F32, s->n_head);
        ggml_format_name(m->k[il], "cache_k_l%d", il);
        ggml_format_name(m->v[il], "cache_v_l%d", il);
    }
    m->buffer = ggml_backend_alloc_ctx_tensors(m->memory, m->backend);
    for (int il = 0; il < s->n_layer; il++) {
        fill_cache(m, m->k[il]);
        fill_cache(m, m->v[il]);
        float sinks[MAX_HEADS];
        for (int h = 0; h < MAX_HEADS; h++) {
            sinks[h] = 2.0f * random_unit();
        }
        ggml_backend_tensor_set(m->sinks[il], sinks, 0, (size_t)s->n_head * sizeof(float));
    }
    for (int c = 0; c < 2; c++) {
        shuffle(m->order[c]);
        memset(m->holder[c], -1, sizeof m->holder[c]);
        memset(m->token[c], -1, sizeof m->token[c]);
    }
    return m;
}

void model_free(struct model *m) {
    ggml_backend_sched_free(m->sched);
    ggml_backend_buffer_free(m->buffer);
    ggml_free(m->memory);
    ggml_backend_free(m->backend);
    free(m);
}

/* ---- graph ---- */

static struct ggml_tensor *input(struct ggml_tensor *t, const char *name, int il) {
    ggml_set_input(t);
    ggml_set_output(t); /* its memory is not used again: the graph may run twice, and is compared afterwards */
    if (il >= 0) {
        ggml_format_name(t, "%s-%d", name, il);
    } else {
        ggml_set_name(t, name);
    }
    return t;
}

/* llama.cpp's build_attn_mha without what does not concern attention. */
static struct ggml_tensor *attention(const struct model *m, struct run *r, int il, struct ggml_tensor *k,
                                     struct ggml_tensor *v, struct ggml_tensor *mask) {
    const struct shape *s = &m->s;
    struct ggml_tensor *q = ggml_permute(r->ctx, ggml_view_3d(r->ctx, r->q[il], s->d, s->n_head, r->q[il]->ne[2],
                                                              r->q[il]->nb[1], r->q[il]->nb[2], 0), 0, 2, 1, 3);
    struct ggml_tensor *out;
    if (s->flash) {
        out = ggml_flash_attn_ext(r->ctx, q, k, v, mask, s->scale, s->max_bias, s->softcap);
        if (s->sinks) {
            ggml_flash_attn_ext_add_sinks(out, m->sinks[il]);
        }
        return out;
    }
    struct ggml_tensor *kq = ggml_mul_mat(r->ctx, k, q);
    if (s->softcap != 0.0f) {
        kq = ggml_scale(r->ctx, kq, s->scale / s->softcap);
        kq = ggml_scale(r->ctx, ggml_tanh(r->ctx, kq), s->softcap);
    }
    kq = ggml_soft_max_ext(r->ctx, kq, mask, s->softcap != 0.0f ? 1.0f : s->scale, s->max_bias);
    if (s->sinks) {
        ggml_soft_max_add_sinks(kq, m->sinks[il]);
    }
    ggml_format_name(kq, "kq_soft_max-%d", il);
    return ggml_mul_mat(r->ctx, ggml_cont(r->ctx, ggml_transpose(r->ctx, v)), kq);
}

static void build_layer(const struct model *m, struct run *r, int il, int n) {
    const struct shape *s = &m->s;
    const int c = cache_of(m, il);
    const int64_t width = (int64_t)s->d * s->n_head_kv;
    r->q[il] = input(ggml_new_tensor_3d(r->ctx, GGML_TYPE_F32, s->d, s->n_head, n), "Qcur", il);
    r->kcur[il] = input(ggml_new_tensor_2d(r->ctx, GGML_TYPE_F32, width, n), "Kcur", il);
    r->vcur[il] = input(ggml_new_tensor_2d(r->ctx, GGML_TYPE_F32, width, n), "Vcur", il);
    ggml_build_forward_expand(r->graph, ggml_set_rows(r->ctx, m->k[il], r->kcur[il], r->index[c]));
    ggml_build_forward_expand(r->graph, ggml_set_rows(r->ctx, m->v[il], r->vcur[il], r->index[c]));
    struct ggml_tensor *kv[2] = {m->k[il], m->v[il]};
    for (int i = 0; i < 2; i++) {
        const size_t head = ggml_row_size(kv[i]->type, s->d);
        kv[i] = ggml_view_4d(r->ctx, kv[i], s->d, s->n_head_kv, N_CELLS, 1, head, kv[i]->nb[1], kv[i]->nb[2], 0);
        kv[i] = ggml_permute(r->ctx, kv[i], 0, 2, 1, 3);
    }
    r->out[il] = attention(m, r, il, kv[0], kv[1], r->mask[c]);
    ggml_set_output(r->out[il]);
    struct ggml_tensor *l_out = ggml_scale(r->ctx, r->out[il], 2.0f);
    ggml_format_name(l_out, "l_out-%d", il);
    ggml_build_forward_expand(r->graph, l_out);
}

/* Hands out cells, and says what every row sees: earlier rows, but for random holes. */
static void place(struct model *m, struct run *r, const struct batch *b, int64_t index[2][MAX_ROWS]) {
    const int base = m->n_used;
    for (int c = 0; c < 2; c++) {
        for (int i = 0; i < b->n; i++) {
            const int at = b->reuse >= 0 ? b->reuse + i : base + i;
            const int32_t cell = m->order[c][at % N_CELLS];
            index[c][i] = cell;
            m->holder[c][cell] = base + i;
            m->token[c][cell] = b->image != NULL ? b->image[i] : -1;
        }
        for (int i = 0; i < b->n; i++) {
            for (int cell = 0; cell < N_CELLS; cell++) {
                const int pos = m->holder[c][cell];
                bool sees = pos >= 0 && pos <= base + i && random_below(8) != 0;
                sees = sees && (c == 0 || base + i - pos < 24);
                sees = sees || pos == base + i;
                const float far = m->s.max_bias > 0.0f ? -(float)(base + i - pos) : 0.0f;
                r->visible[c][i][cell] = sees ? far : -INFINITY;
            }
        }
    }
    m->n_used += b->n;
}

static void fill_random(struct ggml_tensor *t, float size) {
    const int64_t n = ggml_nelements(t);
    float *data = malloc((size_t)n * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        data[i] = size * random_unit();
    }
    ggml_backend_tensor_set(t, data, 0, (size_t)n * sizeof(float));
    free(data);
}

static void fill_mask(struct ggml_tensor *t, float rows[MAX_ROWS][N_CELLS], int n) {
    for (int i = 0; i < n; i++) {
        if (t->type == GGML_TYPE_F32) {
            ggml_backend_tensor_set(t, rows[i], (size_t)i * t->nb[1], N_CELLS * sizeof(float));
            continue;
        }
        ggml_fp16_t half[N_CELLS];
        ggml_fp32_to_fp16_row(rows[i], half, N_CELLS);
        ggml_backend_tensor_set(t, half, (size_t)i * t->nb[1], sizeof half);
    }
}

struct run *run_build(struct model *m, const struct batch *b) {
    struct run *r = calloc(1, sizeof *r);
    int64_t index[2][MAX_ROWS];
    place(m, r, b, index);
    r->ctx = ggml_init((struct ggml_init_params){
        .mem_size = 256 * ggml_tensor_overhead() + ggml_graph_overhead(), .no_alloc = true});
    r->graph = ggml_new_graph(r->ctx);
    const int n_caches = m->s.sliding ? 2 : 1;
    for (int c = 0; c < n_caches; c++) {
        r->index[c] = input(ggml_new_tensor_1d(r->ctx, GGML_TYPE_I64, b->n), "attn_inp_k_idxs", -1);
        const enum ggml_type type = m->s.flash ? GGML_TYPE_F16 : GGML_TYPE_F32;
        r->mask[c] = input(ggml_new_tensor_4d(r->ctx, type, N_CELLS, b->n, 1, 1), "attn_inp_kq_mask", -1);
    }
    for (int il = 0; il < m->s.n_layer; il++) {
        build_layer(m, r, il, b->n);
    }
    ggml_backend_sched_reset(m->sched);
    if (!ggml_backend_sched_alloc_graph(m->sched, r->graph)) {
        abort();
    }
    for (int c = 0; c < n_caches; c++) {
        ggml_backend_tensor_set(r->index[c], index[c], 0, (size_t)b->n * sizeof(int64_t));
        fill_mask(r->mask[c], r->visible[c], b->n);
    }
    for (int il = 0; il < m->s.n_layer; il++) {
        fill_random(r->q[il], 1.5f);
        fill_random(r->kcur[il], 1.5f);
        fill_random(r->vcur[il], 1.0f);
    }
    return r;
}

int run_compute(struct model *m, struct run *r, ggml_backend_sched_eval_callback cb, void *data) {
    ggml_backend_sched_set_eval_callback(m->sched, cb, data);
    return (int)ggml_backend_sched_graph_compute(m->sched, r->graph);
}

void run_free(struct model *m, struct run *r) {
    ggml_backend_sched_reset(m->sched);
    ggml_free(r->ctx);
    free(r);
}

/* ---- what is expected ---- */

double exact_softmax(const float *scores, const float *mask, float slope, int n, const float *sink, double *p) {
    double max = sink != NULL ? *sink : -INFINITY, sum = 0.0;
    for (int c = 0; c < n; c++) {
        p[c] = mask != NULL && mask[c] == -INFINITY ? -INFINITY
                                                    : (double)scores[c] + (mask != NULL ? (double)slope * mask[c] : 0.0);
        max = p[c] > max ? p[c] : max;
    }
    for (int c = 0; c < n; c++) {
        p[c] = p[c] == -INFINITY ? 0.0 : exp(p[c] - max);
        sum += p[c];
    }
    sum += sink != NULL ? exp(*sink - max) : 0.0;
    for (int c = 0; c < n; c++) {
        p[c] = sum > 0.0 ? p[c] / sum : 0.0;
    }
    return sum;
}

static void cache_row(const struct model *m, int il, int cell, int head, float *out) {
    const struct ggml_tensor *t = m->k[il];
    const char *src = (const char *)t->data + (size_t)cell * t->nb[1] + (size_t)head * ggml_row_size(t->type, m->s.d);
    if (t->type == GGML_TYPE_F32) {
        memcpy(out, src, (size_t)m->s.d * sizeof(float));
    } else {
        ggml_get_type_traits(t->type)->to_float(src, out, m->s.d);
    }
}

static float alibi(const struct shape *s, int head) {
    const int below = 1 << (int)floor(log2(s->n_head));
    const double m0 = pow(2.0, -s->max_bias / below), m1 = pow(2.0, -(s->max_bias / 2.0) / below);
    return s->max_bias > 0.0f ? (float)(head < below ? pow(m0, head + 1) : pow(m1, 2 * (head - below) + 1)) : 1.0f;
}

static void row_probabilities(const struct model *m, const struct run *r, int il, int head, int row, double *p) {
    const struct shape *s = &m->s;
    const int c = cache_of(m, il);
    const float *q = (const float *)((const char *)r->q[il]->data + (size_t)row * r->q[il]->nb[2] +
                                     (size_t)head * r->q[il]->nb[1]);
    float scores[N_CELLS], k[256];
    for (int cell = 0; cell < N_CELLS; cell++) {
        cache_row(m, il, cell, head / (s->n_head / s->n_head_kv), k);
        double dot = 0.0;
        for (int i = 0; i < s->d; i++) {
            dot += (double)q[i] * k[i];
        }
        dot *= s->scale;
        scores[cell] = (float)(s->softcap != 0.0f ? s->softcap * tanh(dot / s->softcap) : dot);
    }
    float sink = 0.0f;
    ggml_backend_tensor_get(m->sinks[il], &sink, (size_t)head * sizeof(float), sizeof sink);
    exact_softmax(scores, r->visible[c][row], alibi(s, head), N_CELLS, s->sinks ? &sink : NULL, p);
}

static double selectivity(const double *p, const int32_t *token, int n_image) {
    double sum = 0.0, entropy = 0.0;
    for (int c = 0; c < N_CELLS; c++) {
        sum += token[c] >= 0 ? p[c] : 0.0;
    }
    for (int c = 0; c < N_CELLS; c++) {
        const double x = token[c] >= 0 && sum > 0.0 ? p[c] / sum : 0.0;
        entropy -= x > 0.0 ? x * log(x) : 0.0;
    }
    const double s = 1.0 - entropy / log(n_image);
    return s > 0.0 ? s * s : 0.0;
}

void run_expect(struct model *m, const struct run *r, const struct batch *b, int n_image) {
    for (int il = 0; il < m->s.n_layer; il++) {
        const int32_t *token = m->token[cache_of(m, il)];
        for (int head = 0; head < m->s.n_head; head++) {
            for (int i = 0; b->rows != NULL && i < b->n; i++) {
                double p[N_CELLS];
                if (b->rows[i] == 0) {
                    continue;
                }
                row_probabilities(m, r, il, head, i, p);
                const double s = selectivity(p, token, n_image);
                for (int c = 0; c < N_CELLS; c++) {
                    for (int k = 0; k < LV_N_CLASS && token[c] >= 0; k++) {
                        if ((b->rows[i] >> k & 1) != 0) {
                            m->sums[k][LV_SUM][il][head][token[c]] += p[c];
                            m->sums[k][LV_WEIGHTED][il][head][token[c]] += s * p[c];
                            double *top = &m->sums[k][LV_MAX][il][head][token[c]];
                            *top = p[c] > *top ? p[c] : *top;
                        }
                    }
                }
            }
        }
    }
}
