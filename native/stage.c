/* stage.c - the layers of a text model in runs of their own: what lies before and after the layers of a run is left out,
 * hidden rows are given at the one end and captured at the other. */
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif
#include <stdio.h>
#include <string.h>

#include "tap_internal.h"

static bool is_staged(const lv_tap *tap) { return tap->stage.end > 0; }

int lv_stage(lv_tap *tap, int32_t first, int32_t end, int32_t width, const float *hidden, bool keep) {
    if (tap == NULL) {
        return LV_E_ARG;
    }
    if (tap->phase != LV_LLM || first < 0 || first >= end || end > tap->n_layer || end - first == tap->n_layer ||
        width < 1 || width > LV_MAX_WIDTH || (hidden != NULL) != (first > 0)) {
        lv_fail(tap, LV_E_ARG, "layers %d to %d of %d, width %d: out of range, all, without rows, or not in a run", first,
                end, tap->n_layer, width);
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
    s->first = first;
    s->end = end;
    s->width = width;
    s->keep = keep;
    s->begun = s->given = s->captured = false;
    s->place = first > 0 ? LV_BELOW : LV_WITHIN;
    s->n_written = s->n_copies = 0;
    snprintf(s->in, sizeof s->in, "l_out-%d", first - 1);
    snprintf(s->out, sizeof s->out, "l_out-%d", end - 1);
    return LV_OK;
}

int lv_stage_read(const lv_tap *tap, float *out, size_t size) {
    if (tap == NULL || out == NULL || !is_staged(tap) || !tap->stage.captured || tap->status != LV_OK ||
        size != (size_t)tap->n_rows * (size_t)tap->stage.width) {
        return LV_E_ARG;
    }
    memcpy(out, tap->stage.hidden.data, size * sizeof(float));
    return LV_OK;
}

bool lv_stage_runs(const lv_tap *tap, int layer) {
    return !is_staged(tap) || (layer >= tap->stage.first && layer < tap->stage.end);
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
    if (lv_is_empty(t) || !lv_clear_flag(tap, t)) {
        return true;
    }
    /* what it would have written into a cache is missing there, or was written by a run before this one */
    if (t->view_src != NULL && root(t)->op == GGML_OP_NONE) {
        if (!s->keep || s->place != LV_BELOW) {
            give_back(root(t));
        }
        if (s->n_written == LV_MAX_WRITTEN) {
            lv_fail(tap, LV_E_GRAPH, "layers below %d write to more than %d caches", s->first, LV_MAX_WRITTEN);
            return true;
        }
        s->written[s->n_written++] = root(t);
    }
    return true;
}

/* What was left out, if `src` is a scheduler's copy of it for another device, "CUDA1#l_out-3 (view)#0": of that the copy
 * has the name alone. */
static const struct ggml_tensor *uncopied(lv_tap *tap, const struct ggml_tensor *src) {
    struct lv_stage *s = &tap->stage;
    if (strchr(src->name, '#') == NULL || lv_is_copy_of(src, s->in)) {
        return NULL;
    }
    for (int i = 0; i < s->n_copies; i++) {
        if (s->copies[i] == src) {
            return NULL;
        }
    }
    struct ggml_tensor **cleared = tap->cleared.data;
    for (size_t i = 0; i < tap->n_cleared; i++) {
        if (lv_is_copy_of(src, cleared[i]->name)) {
            return cleared[i];
        }
    }
    for (int i = 0; i < s->n_written; i++) {
        if (lv_is_copy_of(src, s->written[i]->name)) {
            return s->written[i];
        }
    }
    lv_once(s->copies, &s->n_copies, src);
    return NULL;
}

/* The first tensor that t reads and that was left out, NULL = none. */
static const struct ggml_tensor *missing(lv_tap *tap, const struct ggml_tensor *t) {
    const struct lv_stage *s = &tap->stage;
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        const struct ggml_tensor *src = lv_computed(t->src[i]);
        if (src == NULL || strcmp(src->name, s->in) == 0) {
            continue;
        }
        if (src->op != GGML_OP_NONE && (src->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
            return src;
        }
        const struct ggml_tensor *original = src->op == GGML_OP_NONE ? uncopied(tap, src) : NULL;
        if (original != NULL) {
            return original;
        }
        for (int w = 0; w < s->n_written; w++) {
            if (s->written[w] == root(src)) {
                return src;
            }
        }
    }
    return NULL;
}

/* A node where rows are handed over: the last one before the layers that run, or the last one of them. */
static enum lv_step ask_cut(lv_tap *tap, struct ggml_tensor *t, enum lv_place before, enum lv_place after) {
    struct lv_stage *s = &tap->stage;
    if (s->place != before) {
        lv_fail(tap, LV_E_GRAPH, "the graph has two nodes '%s', or has them in another order", t->name);
        skip(tap, t);
        return LV_SKIP;
    }
    if (before == LV_BELOW) {
        skip(tap, t);
    }
    s->place = after;
    return LV_CUT;
}

enum lv_step lv_stage_ask(lv_tap *tap, struct ggml_tensor *t) {
    struct lv_stage *s = &tap->stage;
    if (tap->status != LV_OK) { /* nothing may run on rows that are not there */
        skip(tap, t);
        return LV_SKIP;
    }
    if (s->first > 0 && strcmp(t->name, s->in) == 0) {
        return ask_cut(tap, t, LV_BELOW, LV_WITHIN);
    }
    if (s->end < tap->n_layer && strcmp(t->name, s->out) == 0) {
        return ask_cut(tap, t, LV_WITHIN, LV_ABOVE);
    }
    if (s->place == LV_BELOW) {
        s->begun = s->begun || lv_number_after_dash(t->name) == 0;
        return s->begun && skip(tap, t) ? LV_SKIP : LV_RUN;
    }
    if (s->place == LV_ABOVE) {
        return skip(tap, t) ? LV_SKIP : LV_RUN;
    }
    const bool computed = s->first > 0 && !lv_is_empty(t) && (t->flags & GGML_TENSOR_FLAG_COMPUTE) != 0;
    const struct ggml_tensor *gone = computed ? missing(tap, t) : NULL;
    if (gone != NULL) {
        lv_fail(tap, LV_E_GRAPH, "'%s' above layer %d reads '%s' from below it", t->name, s->first, gone->name);
        skip(tap, t);
        return LV_SKIP;
    }
    return LV_RUN;
}

bool lv_stage_done(lv_tap *tap, struct ggml_tensor *t) {
    struct lv_stage *s = &tap->stage;
    if (!is_staged(tap)) {
        return false;
    }
    const bool given = s->first > 0 && strcmp(t->name, s->in) == 0;
    if (!given && (s->end == tap->n_layer || strcmp(t->name, s->out) != 0)) {
        return false;
    }
    if (t->type != GGML_TYPE_F32 || !ggml_is_contiguous(t) || t->ne[0] != s->width || ggml_nrows(t) != tap->n_rows) {
        lv_fail(tap, LV_E_GRAPH, "'%s' is %lld x %lld of %s, expected %d x %d of f32", t->name, (long long)t->ne[0],
                (long long)ggml_nrows(t), ggml_type_name(t->type), s->width, tap->n_rows);
        return true;
    }
    const size_t size = ggml_nbytes(t);
    if (given) {
        s->given = lv_write(tap, t, s->hidden.data, size);
        return true;
    }
    const void *rows = lv_host(tap, &tap->fetch[5], t, size);
    if (rows != NULL) {
        memcpy(s->hidden.data, rows, size); /* the rows that were given are in the graph by now */
        s->captured = true;
    }
    return true;
}

void lv_stage_complete(lv_tap *tap) {
    const struct lv_stage *s = &tap->stage;
    if (is_staged(tap) && ((s->first > 0 && !s->given) || (s->end < tap->n_layer && !s->captured))) {
        lv_fail(tap, LV_E_GRAPH, "the graph has no node '%s'", s->first > 0 && !s->given ? s->in : s->out);
    }
}
