/* kernels.h - the hot loops, compiled once per instruction set and chosen at run time.
 *
 * Layout: a block holds LV_LANES query rows side by side, so every loop over cells works on LV_LANES rows at once:
 *   q (d, LV_LANES)    the rows' queries, transposed and already multiplied by the scale
 *   s (n, LV_LANES)    scores of n cells, turned into exp(score - maximum) in place
 */
#ifndef LOCALVLM_KERNELS_H
#define LOCALVLM_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define LV_LANES 16
#define LV_TILE 8 /* cells whose keys are converted to float32 at a time */

struct lv_stats {
    float max[LV_LANES];
    float sum[LV_LANES];   /* denominator of the softmax, sink included */
    float image[LV_LANES]; /* the part of it that lies on image cells; only with flags */
    float slog[LV_LANES];  /* sum over image cells of e ln e; only with flags */
};

struct lv_softmax {
    const float *mask; /* (n, LV_LANES) or NULL; -inf hides a cell, whatever its score (it may be NaN) */
    const float *flag; /* (n) 1 for image cells, else 0; NULL = not wanted */
    const float *sink; /* one value or NULL */
    float slope;       /* ALiBi factor of the mask */
    float softcap;     /* 0 = none */
};

struct lv_kernels {
    const char *name;
    /* float16 row to float32 */
    void (*from_f16)(const uint16_t *x, float *y, int64_t n);
    /* s (n_cells, LV_LANES) = k (n_cells, d) q; n_cells <= LV_TILE */
    void (*scores)(const float *q, const float *k, int64_t d, int n_cells, float *s);
    float (*dot)(const float *a, const float *b, int64_t n);
    /* s[c] = float16 row at k + c stride, times q */
    void (*dots_f16)(const char *k, size_t stride, int64_t n_cells, const float *q, int64_t d, float *s);
    void (*softmax)(float *s, int64_t n, const struct lv_softmax *o, struct lv_stats *st);
    /* one row: mask (n), s (n); the first entries of st are used */
    void (*softmax_row)(float *s, int64_t n, const struct lv_softmax *o, struct lv_stats *st);
    /* out[image[j]] += sum over lanes of w e[cell[j]], or the maximum of both */
    void (*add)(float *out, const float *e, const int32_t *cell, const int32_t *image, int64_t n, const float *w);
    void (*top)(float *out, const float *e, const int32_t *cell, const int32_t *image, int64_t n, const float *w);
};

extern const struct lv_kernels lv_kernels_base;
#ifdef LV_HAVE_X86_VARIANTS
extern const struct lv_kernels lv_kernels_avx2;
extern const struct lv_kernels lv_kernels_avx512;
#endif

/* The best set this machine can run. */
const struct lv_kernels *lv_kernels_pick(void);

#endif
