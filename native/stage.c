/* stage.c - a text model's layers run in two contexts: the front captures the hidden rows after a layer and leaves out
 * what follows, the tail leaves out what comes before and goes on from rows it is given. */
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif
#include <stdio.h>
#include <string.h>

#include "tap_internal.h"

int lv_stage(lv_tap *tap, int mode, int32_t layer, int32_t width, const float *hidden) {
    if (tap == NULL) {
        return LV_E_ARG;
    }
    if (tap->phase != LV_LLM || (mode != LV_STAGE_FRONT && mode != LV_STAGE_TAIL) || layer < 1 ||
        layer >= tap->n_layer || width < 1 || width > LV_MAX_WIDTH || (hidden != NULL) != (mode == LV_STAGE_TAIL)) {
        lv_fail(tap, LV_E_ARG, "stage %d at layer %d of %d, width %d: out of range, without rows, or not in a run", mode,
                layer, tap->n_layer, width);
        return LV_E_ARG;
    }
    struct lv_stage *s = &tap->stage;
    const size_t size = (size_t)tap->n_rows * (size_t)width * sizeof(float);
    if (!lv_grow(tap, &s->hidden, size)) {
        return tap->status;
    }
    if (hidden != NULL) {
        memcpy(s->hidden.data, hidden, size);
    }
    s->mode = mode;
    s->layer = layer;
    s->width = width;
    s->below = s->above = s->held = false;
    s->n_written = 0;
    snprintf(s->cut, sizeof s->cut, "l_out-%d", layer - 1);
    return LV_OK;
}

int lv_stage_read(const lv_tap *tap, float *out, size_t size) {
    if (tap == NULL || out == NULL || tap->stage.mode != LV_STAGE_FRONT || !tap->stage.held || tap->status != LV_OK ||
        size != (size_t)tap->n_rows * (size_t)tap->stage.width) {
        return LV_E_ARG;
    }
    memcpy(out, tap->stage.hidden.data, size * sizeof(float));
    return LV_OK;
}

bool lv_stage_runs(const lv_tap *tap, int layer) {
    const struct lv_stage *s = &tap->stage;
    return s->mode == LV_STAGE_OFF || (s->mode == LV_STAGE_FRONT) == (layer < s->layer);
}

/* Views and reshapes: no backend computes them. */
static bool is_empty(const struct ggml_tensor *t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE ||
           t->op == GGML_OP_TRANSPOSE;
}

/* The tensor whose memory t lies in. */
static const struct ggml_tensor *root(const struct ggml_tensor *t) {
    while (t->view_src != NULL) {
        t = t->view_src;
    }
    return t;
}

/* Gives the memory of a cache that is left out back to the system: llama.cpp allocates every layer's, and fills it with
 * zeros, as which it reads again. Whole pages of plain memory only, and only where the system promises that. */
static void give_back(const struct ggml_tensor *cache) {
#ifdef __linux__
    if (cache->buffer == NULL || ggml_backend_buffer_get_type(cache->buffer) != ggml_backend_cpu_buffer_type()) {
        return;
    }
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), data = (uintptr_t)cache->data;
    const uintptr_t first = (data + page - 1) / page * page, end = (data + ggml_nbytes(cache)) / page * page;
    if (first < end) {
        madvise((void *)first, end - first, MADV_DONTNEED); /* what fails has cost nothing but memory */
    }
#else
    (void)cache;
#endif
}

static bool skip(lv_tap *tap, struct ggml_tensor *t) {
    struct lv_stage *s = &tap->stage;
    if (is_empty(t) || !lv_clear_flag(tap, t)) {
        return true;
    }
    /* what it would have written into a cache is missing there */
    if (t->view_src != NULL && root(t)->op == GGML_OP_NONE) {
        give_back(root(t));
        if (s->n_written == LV_MAX_WRITTEN) {
            lv_fail(tap, LV_E_GRAPH, "layers below %d write to more than %d caches", s->layer, LV_MAX_WRITTEN);
            return true;
        }
        s->written[s->n_written++] = root(t);
    }
    return true;
}

/* The first tensor that t reads and that was left out, NULL = none. */
static const struct ggml_tensor *missing(const struct lv_stage *s, const struct ggml_tensor *t) {
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        const struct ggml_tensor *src = t->src[i];
        while (src != NULL && is_empty(src) && src->op != GGML_OP_NONE) {
            src = src->view_src != NULL ? src->view_src : src->src[0];
        }
        if (src == NULL || strcmp(src->name, s->cut) == 0) {
            continue;
        }
        if (src->op != GGML_OP_NONE && (src->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
            return src;
        }
        for (int w = 0; w < s->n_written; w++) {
            if (s->written[w] == root(src)) {
                return src;
            }
        }
    }
    return NULL;
}

enum lv_step lv_stage_ask(lv_tap *tap, struct ggml_tensor *t) {
    struct lv_stage *s = &tap->stage;
    if (tap->status != LV_OK) { /* nothing may run on rows that are not there */
        skip(tap, t);
        return LV_SKIP;
    }
    if (strcmp(t->name, s->cut) == 0) {
        if (s->above) {
            lv_fail(tap, LV_E_GRAPH, "the graph has two nodes '%s'", s->cut);
            skip(tap, t);
            return LV_SKIP;
        }
        s->above = true;
        if (s->mode == LV_STAGE_TAIL) {
            skip(tap, t);
        }
        return LV_CUT;
    }
    if (s->mode == LV_STAGE_FRONT) {
        return s->above && skip(tap, t) ? LV_SKIP : LV_RUN;
    }
    s->below = s->below || lv_number_after_dash(t->name) == 0;
    if (!s->above) {
        return s->below && skip(tap, t) ? LV_SKIP : LV_RUN;
    }
    const bool computed = !is_empty(t) && (t->flags & GGML_TENSOR_FLAG_COMPUTE) != 0;
    const struct ggml_tensor *gone = computed ? missing(s, t) : NULL;
    if (gone != NULL) {
        lv_fail(tap, LV_E_GRAPH, "'%s' above layer %d reads '%s' from below it", t->name, s->layer, gone->name);
        skip(tap, t);
        return LV_SKIP;
    }
    return LV_RUN;
}

bool lv_stage_done(lv_tap *tap, struct ggml_tensor *t) {
    struct lv_stage *s = &tap->stage;
    if (s->mode == LV_STAGE_OFF || strcmp(t->name, s->cut) != 0) {
        return false;
    }
    if (t->type != GGML_TYPE_F32 || !ggml_is_contiguous(t) || t->ne[0] != s->width || ggml_nrows(t) != tap->n_rows) {
        lv_fail(tap, LV_E_GRAPH, "'%s' is %lld x %lld of %s, expected %d x %d of f32", s->cut, (long long)t->ne[0],
                (long long)ggml_nrows(t), ggml_type_name(t->type), s->width, tap->n_rows);
        return true;
    }
    const size_t size = ggml_nbytes(t);
    if (s->mode == LV_STAGE_TAIL) {
        s->held = lv_write(tap, t, s->hidden.data, size);
        return true;
    }
    const void *rows = lv_host(tap, &tap->fetch[5], t, size);
    if (rows != NULL) {
        memcpy(s->hidden.data, rows, size);
        s->held = true;
    }
    return true;
}

void lv_stage_complete(lv_tap *tap) {
    const struct lv_stage *s = &tap->stage;
    if (s->mode != LV_STAGE_OFF && !s->held) {
        lv_fail(tap, LV_E_GRAPH, "the graph has no node '%s'", s->cut);
    }
}
