/* tap.c - life, errors, cancel and the callback itself. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tap_internal.h"

#ifdef _OPENMP
#include <omp.h>
#endif

lv_tap *lv_tap_new(void) {
    lv_tap *tap = calloc(1, sizeof *tap);
    if (tap == NULL) {
        return NULL;
    }
    tap->kernels = lv_kernels_pick();
    tap->n_threads = 1;
    tap->tolerance = 0.02f;
    memset(tap->map_of_layer, -1, sizeof tap->map_of_layer);
    return tap;
}

void lv_tap_free(lv_tap *tap) {
    if (tap == NULL) {
        return;
    }
    for (int c = 0; c < LV_N_CLASS; c++) {
        for (int r = 0; r < LV_N_REDUCTION; r++) {
            free(tap->sums[c][r]);
        }
    }
    struct lv_buf *single[] = {&tap->image, &tap->rows, &tap->pos, &tap->armed, &tap->cleared,
                               &tap->stage.hidden, &tap->cut.rows,
                               &tap->tower.out, &tap->tower.window, &tap->tower.heads,
                               &tap->tower.rows, &tap->tower.table};
    for (size_t i = 0; i < sizeof single / sizeof single[0]; i++) {
        free(single[i]->data);
    }
    for (size_t i = 0; i < sizeof tap->fetch / sizeof tap->fetch[0]; i++) {
        free(tap->fetch[i].data);
    }
    for (int i = 0; i < LV_MAX_THREADS; i++) {
        free(tap->scratch[i].data);
    }
    for (int i = 0; i < LV_N_MASK; i++) {
        free(tap->masks[i].data.data);
        free(tap->masks[i].first.data);
        free(tap->masks[i].end.data);
    }
    lv_maps_free(tap);
    free(tap);
}

const char *lv_tap_error(const lv_tap *tap) { return tap != NULL ? tap->error : "no tap"; }

int lv_fail(lv_tap *tap, int code, const char *format, ...) {
    if (tap->status == LV_OK) {
        va_list args;
        va_start(args, format);
        vsnprintf(tap->error, sizeof tap->error, format, args);
        va_end(args);
        tap->status = code;
    }
    return code;
}

bool lv_grow(lv_tap *tap, struct lv_buf *buf, size_t size) {
    if (buf->size >= size && buf->data != NULL) {
        return true;
    }
    free(buf->data);
    buf->data = malloc(size > 0 ? size : 1);
    buf->size = buf->data != NULL ? size : 0;
    if (buf->data == NULL) {
        lv_fail(tap, LV_E_MEMORY, "no memory for a buffer of %zu bytes", size);
    }
    return buf->data != NULL;
}

static ggml_backend_buffer_t buffer_of(const struct ggml_tensor *t) {
    return t->view_src != NULL ? t->view_src->buffer : t->buffer;
}

const void *lv_host(lv_tap *tap, struct lv_buf *buf, const struct ggml_tensor *t, size_t size) {
    const ggml_backend_buffer_t buffer = buffer_of(t);
    if (buffer == NULL || t->data == NULL || size > ggml_nbytes(t)) {
        lv_fail(tap, LV_E_GRAPH, "tensor '%s' has no data, or fewer than the %zu bytes wanted", t->name, size);
        return NULL;
    }
    if (ggml_backend_buffer_is_host(buffer) && !tap->copy_always) {
        return t->data;
    }
    if (!lv_grow(tap, buf, size)) {
        return NULL;
    }
    ggml_backend_tensor_get(t, buf->data, 0, size);
    return buf->data;
}

bool lv_write(lv_tap *tap, struct ggml_tensor *t, const void *data, size_t size) {
    if (buffer_of(t) == NULL || t->data == NULL || size > ggml_nbytes(t)) {
        lv_fail(tap, LV_E_GRAPH, "input '%s' cannot be written: %zu bytes into %zu", t->name, size, ggml_nbytes(t));
        return false;
    }
    ggml_backend_tensor_set(t, data, 0, size);
    return true;
}

/* A scheduler names its copy of an input "CUDA0#positions#0". */
bool lv_has_name(const struct ggml_tensor *t, const char *name) {
    if (strcmp(t->name, name) == 0) {
        return true;
    }
    const char *hash = strchr(t->name, '#');
    const size_t n = strlen(name);
    return hash != NULL && strncmp(hash + 1, name, n) == 0 && (hash[1 + n] == '#' || hash[1 + n] == '\0');
}

bool lv_is_copy_of(const struct ggml_tensor *t, const char *name) {
    const char *hash = t->op == GGML_OP_NONE ? strchr(t->name, '#') : NULL;
    const size_t n = strlen(name);
    return hash != NULL && n > 0 && strncmp(hash + 1, name, n) == 0 && (hash[1 + n] == '#' || hash[1 + n] == ' ');
}

bool lv_starts(const struct ggml_tensor *t, const char *prefix) {
    return strncmp(t->name, prefix, strlen(prefix)) == 0;
}

int lv_number_after_dash(const char *name) {
    for (const char *p = strchr(name, '-'); p != NULL; p = strchr(p + 1, '-')) {
        int value = 0, digits = 0;
        while (p[1 + digits] >= '0' && p[1 + digits] <= '9' && digits < 6) {
            value = 10 * value + (p[1 + digits] - '0');
            digits++;
        }
        const char after = p[1 + digits];
        if (digits > 0 && (after == '\0' || after == ' ' || after == '#')) {
            return value;
        }
    }
    return -1;
}

int lv_once(const struct ggml_tensor **list, int *n, const struct ggml_tensor *t) {
    for (int i = 0; i < *n; i++) {
        if (list[i] == t) {
            return 0;
        }
    }
    if (*n == LV_MAX_INPUTS) {
        return -1;
    }
    list[(*n)++] = t;
    return 1;
}

void lv_parallel(lv_tap *tap, int n, void (*task)(void *ctx, int i, int thread), void *ctx) {
#ifdef _OPENMP
    if (tap->n_threads > 1 && n > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(tap->n_threads)
        for (int i = 0; i < n; i++) {
            task(ctx, i, omp_get_thread_num());
        }
        return;
    }
#else
    (void)tap;
#endif
    for (int i = 0; i < n; i++) {
        task(ctx, i, 0);
    }
}

int lv_tap_threads(lv_tap *tap, int32_t n_threads) {
    if (tap == NULL || n_threads < 1) {
        return LV_E_ARG;
    }
    tap->n_threads = n_threads < LV_MAX_THREADS ? n_threads : LV_MAX_THREADS;
    return LV_OK;
}

int lv_tap_cancel_points(lv_tap *tap, bool on) {
    if (tap == NULL) {
        return LV_E_ARG;
    }
    tap->points = on;
    return LV_OK;
}

bool lv_tap_abort(void *user_data) {
    lv_tap *tap = user_data;
    return tap != NULL && atomic_load_explicit(&tap->cancelled, memory_order_relaxed) != 0;
}

void lv_tap_cancel(lv_tap *tap) {
    if (tap != NULL) {
        atomic_store(&tap->cancelled, 1);
    }
}

void lv_tap_cancel_reset(lv_tap *tap) {
    if (tap != NULL) {
        atomic_store(&tap->cancelled, 0);
    }
}

bool lv_note_node(lv_tap *tap, struct ggml_tensor *t) {
    const size_t need = (tap->n_cleared + 1) * sizeof t;
    if (need > tap->cleared.size) {
        void *more = realloc(tap->cleared.data, 2 * need + 4096);
        if (more == NULL) {
            lv_fail(tap, LV_E_MEMORY, "no memory for a list of %zu nodes", tap->n_cleared + 1);
            return false;
        }
        tap->cleared.data = more;
        tap->cleared.size = 2 * need + 4096;
    }
    ((struct ggml_tensor **)tap->cleared.data)[tap->n_cleared++] = t;
    return true;
}

bool lv_clear_flag(lv_tap *tap, struct ggml_tensor *t) {
    if ((t->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
        return true;
    }
    if (!lv_note_node(tap, t)) {
        return false;
    }
    t->flags &= ~GGML_TENSOR_FLAG_COMPUTE;
    return true;
}

bool lv_is_empty(const struct ggml_tensor *t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE ||
           t->op == GGML_OP_TRANSPOSE;
}

const struct ggml_tensor *lv_computed(const struct ggml_tensor *t) {
    while (t != NULL && lv_is_empty(t) && t->op != GGML_OP_NONE) {
        t = t->view_src != NULL ? t->view_src : t->src[0];
    }
    return t;
}

bool lv_cancel_node(lv_tap *tap, struct ggml_tensor *t, bool ask) {
    if (tap->status == LV_OK) {
        lv_fail(tap, LV_E_CANCELLED, "cancelled");
    }
    if (!ask) {
        return true; /* false would end this split only; the cleared flags end all of them */
    }
    lv_clear_flag(tap, t); /* without memory it is computed after all: slow, but never left without its flag */
    return false;
}

void lv_restore_flags(lv_tap *tap) {
    struct ggml_tensor **list = tap->cleared.data;
    for (size_t i = 0; i < tap->n_cleared; i++) {
        list[i]->flags |= GGML_TENSOR_FLAG_COMPUTE;
    }
    tap->n_cleared = 0;
}

bool lv_tap_eval(struct ggml_tensor *t, bool ask, void *user_data) {
    lv_tap *tap = user_data;
    if (tap == NULL || t == NULL) {
        return !ask;
    }
    if (lv_tap_abort(tap)) {
        return lv_cancel_node(tap, t, ask);
    }
    const bool tower = tap->phase == LV_TOWER;
    if (ask) {
        return tower ? lv_tower_ask(tap, t) : lv_llm_ask(tap, t);
    }
    if (tap->status == LV_OK && tap->phase != LV_IDLE) {
        tower ? lv_tower_done(tap, t) : lv_llm_done(tap, t);
    }
    return true;
}
