/* fixture.h - graphs like llama.cpp's, made of random numbers, and a plain double-precision softmax to compare with. */
#ifndef LOCALVLM_TAP_FIXTURE_H
#define LOCALVLM_TAP_FIXTURE_H

#include <stdbool.h>
#include <stdint.h>

#include "ggml-backend.h"
#include "ggml.h"
#include "tap_internal.h"

#define N_CELLS 256
#define MAX_LAYERS 4
#define MAX_HEADS 8
#define MAX_ROWS 96
#define MAX_IMAGE 64

void expect_at(bool ok, const char *file, int line, const char *format, ...) __attribute__((format(printf, 4, 5)));
#define EXPECT(ok, ...) expect_at(ok, __FILE__, __LINE__, __VA_ARGS__)
int failures(void);

float random_unit(void); /* -1..1, seeded */
uint32_t random_below(uint32_t n);

/* One text model: caches, and what may differ between models. */
struct shape {
    enum ggml_type type; /* of the K cache; V is F16, or F32 without flash attention */
    int n_layer, n_head, n_head_kv, d;
    float scale, softcap, max_bias;
    bool sinks, flash, sliding; /* sliding: odd layers use a second cache and see little */
    bool fill_nan;              /* unwritten cells hold NaN */
};

struct model {
    struct shape s;
    ggml_backend_t backend;
    ggml_backend_sched_t sched;
    struct ggml_context *memory;
    ggml_backend_buffer_t buffer;
    struct ggml_tensor *k[MAX_LAYERS], *v[MAX_LAYERS], *sinks[MAX_LAYERS];
    int32_t order[2][N_CELLS];   /* cells of each cache in the order they are handed out */
    int32_t holder[2][N_CELLS];  /* position whose keys the cell holds, -1 = none */
    int32_t token[2][N_CELLS];   /* image token, -1 = none */
    int n_used;
    double sums[LV_N_CLASS][LV_N_REDUCTION][MAX_LAYERS][MAX_HEADS][MAX_IMAGE]; /* what is expected */
};

struct model *model_new(const struct shape *s);
void model_free(struct model *m);

/* One batch: rows at the next positions. image and rows as in lv_tap_begin. reuse: first cells are taken from the rows
 * at position reuse on (their holders are gone), -1 = fresh cells. */
struct batch {
    int n;
    const int32_t *image;
    const uint8_t *rows;
    int reuse;
};

struct run {
    struct ggml_context *ctx;
    struct ggml_cgraph *graph;
    struct ggml_tensor *q[MAX_LAYERS], *kcur[MAX_LAYERS], *vcur[MAX_LAYERS], *index[2], *mask[2], *out[MAX_LAYERS];
    float visible[2][MAX_ROWS][N_CELLS]; /* mask values */
};

/* Builds the batch's graph, fills its inputs and notes the cells in the model. */
struct run *run_build(struct model *m, const struct batch *b);
int run_compute(struct model *m, struct run *r, ggml_backend_sched_eval_callback cb, void *data);
void run_free(struct model *m, struct run *r);
/* Adds the batch's attention to m->sums; call after the graph ran. */
void run_expect(struct model *m, const struct run *r, const struct batch *b, int n_image);

double exact_softmax(const float *scores, const float *mask, float slope, int n, const float *sink, double *p);

void cut_tests(void);
void stage_tests(void);
void tower_tests(void);

#endif
