/* kernels.c - compiled several times with different -m flags; LV_KERNELS names the table of each. */
#include "kernels.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef LV_KERNELS
#define LV_KERNELS lv_kernels_base
#endif
#define LV_STR_(x) #x
#define LV_STR(x) LV_STR_(x)

#if defined(__AVX512F__)
#define LV_VEC 16
#elif defined(__AVX__)
#define LV_VEC 8
#else
#define LV_VEC 4
#endif

#if defined(__GNUC__)
typedef float vec __attribute__((vector_size(4 * LV_VEC), aligned(4), may_alias));
static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }
static inline vec splat(float x) {
    vec zero = {0};
    return zero + x;
}
#define LV_PER (LV_LANES / LV_VEC) /* vectors in one row of lanes */
#endif

/* e^x for x <= 0, relative error below 2e-7; exactly 0 below -87 (no denormals). */
static inline float exp_neg(float x) {
    const float t = x * 1.44269504088896341f;
    const float n = (t + 12582912.0f) - 12582912.0f; /* nearest integer, by the float's own rounding */
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r * r + r) + 1.0f;
    union {
        uint32_t i;
        float f;
    } two = {.i = (uint32_t)((int32_t)n + 127) << 23};
    return p * two.f;
}

/* Exponent and fraction move to their float places; one multiplication rebiases them, subnormal halves included. What
 * lies beyond the largest half was infinity or NaN. */
static inline float half(uint16_t h) {
    union {
        uint32_t i;
        float f;
    } x = {.i = (uint32_t)(h & 0x7fffu) << 13};
    x.f *= 0x1p112f;
    x.i |= x.f >= 65536.0f ? 0xffu << 23 : 0u;
    x.i |= (uint32_t)(h & 0x8000u) << 16;
    return x.f;
}

static void from_f16(const uint16_t *x, float *y, int64_t n) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) {
        _mm512_storeu_ps(y + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(x + i))));
    }
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
    }
#elif defined(__aarch64__) && defined(__GNUC__)
    for (; i < n; i++) {
        __fp16 h;
        memcpy(&h, x + i, sizeof h);
        y[i] = (float)h;
    }
#endif
    for (; i < n; i++) {
        y[i] = half(x[i]);
    }
}

#if defined(__GNUC__)
/* CELLS x LV_LANES sums stay in registers over the whole of d. */
#define LV_SCORES(NAME, CELLS)                                                                    \
    static inline void NAME(const float *q, const float *k, int64_t d, float *s) {                \
        vec acc[CELLS][LV_PER];                                                                   \
        memset(acc, 0, sizeof acc);                                                               \
        for (int64_t i = 0; i < d; i++) {                                                         \
            _Pragma("GCC unroll 16") for (int v = 0; v < LV_PER; v++) {                           \
                const vec qv = load(q + i * LV_LANES + v * LV_VEC);                               \
                _Pragma("GCC unroll 16") for (int c = 0; c < CELLS; c++) {                        \
                    acc[c][v] += qv * k[c * d + i];                                               \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
        _Pragma("GCC unroll 16") for (int c = 0; c < CELLS; c++) {                                \
            _Pragma("GCC unroll 16") for (int v = 0; v < LV_PER; v++) {                           \
                store(s + c * LV_LANES + v * LV_VEC, acc[c][v]);                                  \
            }                                                                                     \
        }                                                                                         \
    }
#else
#define LV_SCORES(NAME, CELLS)                                                                    \
    static inline void NAME(const float *q, const float *k, int64_t d, float *s) {                \
        memset(s, 0, sizeof(float) * CELLS * LV_LANES);                                           \
        for (int64_t i = 0; i < d; i++) {                                                         \
            for (int c = 0; c < CELLS; c++) {                                                     \
                for (int l = 0; l < LV_LANES; l++) {                                              \
                    s[c * LV_LANES + l] += q[i * LV_LANES + l] * k[c * d + i];                    \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
    }
#endif
LV_SCORES(scores_1, 1)
LV_SCORES(scores_4, 4)
#if LV_VEC == 16
LV_SCORES(scores_8, 8)
#endif

static void scores(const float *q, const float *k, int64_t d, int n_cells, float *s) {
    int c = 0;
#if LV_VEC == 16
    for (; c + 8 <= n_cells; c += 8) {
        scores_8(q, k + c * d, d, s + c * LV_LANES);
    }
#endif
    for (; c + 4 <= n_cells; c += 4) {
        scores_4(q, k + c * d, d, s + c * LV_LANES);
    }
    for (; c < n_cells; c++) {
        scores_1(q, k + c * d, d, s + c * LV_LANES);
    }
}

/* Sum of LV_LANES values in a fixed tree, which the compiler may turn into shuffles. */
static inline float tree(float *t) {
    for (int w = LV_LANES / 2; w > 0; w /= 2) {
        for (int l = 0; l < w; l++) {
            t[l] += t[l + w];
        }
    }
    return t[0];
}

static float dot(const float *a, const float *b, int64_t n) {
    float t[LV_LANES] = {0};
    int64_t i = 0;
    for (; i + LV_LANES <= n; i += LV_LANES) {
        for (int l = 0; l < LV_LANES; l++) {
            t[l] += a[i + l] * b[i + l];
        }
    }
    for (int l = 0; i < n; i++, l++) {
        t[l] += a[i] * b[i];
    }
    return tree(t);
}

/* Keys of one row at a time, as they lie in the cache; d not a multiple of the vector ends in the slow tail. */
static float dot_f16(const uint16_t *a, const float *b, int64_t n) {
    float t[LV_LANES] = {0}, x[LV_LANES];
    for (int64_t i = 0; i < n; i += LV_LANES) {
        const int64_t m = n - i < LV_LANES ? n - i : LV_LANES;
        from_f16(a + i, x, m);
        for (int64_t l = 0; l < m; l++) {
            t[l] += x[l] * b[i + l];
        }
    }
    return tree(t);
}

#if defined(__AVX512F__)
static inline float dot_step(const uint16_t *a, const float *b, int64_t n) {
    __m512 acc = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 x = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(a + i)));
        acc = _mm512_fmadd_ps(x, _mm512_loadu_ps(b + i), acc);
    }
    return _mm512_reduce_add_ps(acc);
}
#elif defined(__F16C__) && defined(__FMA__)
static inline float dot_step(const uint16_t *a, const float *b, int64_t n) {
    __m256 lo = _mm256_setzero_ps(), hi = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        const __m256 x = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(a + i)));
        const __m256 y = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(a + i + 8)));
        lo = _mm256_fmadd_ps(x, _mm256_loadu_ps(b + i), lo);
        hi = _mm256_fmadd_ps(y, _mm256_loadu_ps(b + i + 8), hi);
    }
    lo = _mm256_add_ps(lo, hi);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(lo), _mm256_extractf128_ps(lo, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#else
#define dot_step dot_f16
#endif

static void dots_f16(const char *k, size_t stride, int64_t n_cells, const float *q, int64_t d, float *s) {
    if (d % 16 != 0) {
        for (int64_t c = 0; c < n_cells; c++) {
            s[c] = dot_f16((const uint16_t *)(k + (size_t)c * stride), q, d);
        }
        return;
    }
    for (int64_t c = 0; c < n_cells; c++) {
        s[c] = dot_step((const uint16_t *)(k + (size_t)c * stride), q, d);
    }
}

/* The same for one row and for many: with a constant number of lanes the compiler unrolls either. */
static inline void cap_and_mask(float *s, int64_t n, int lanes, const struct lv_softmax *o, float *max) {
    if (o->softcap != 0.0f) {
        for (int64_t i = 0; i < n * lanes; i++) {
            s[i] = o->softcap * tanhf(s[i]);
        }
    }
    const float slope = o->slope;
    const float *mask = o->mask;
    for (int64_t c = 0; c < n; c++) {
        float *x = s + c * lanes;
        if (mask != NULL) {
            const float *m = mask + c * lanes;
            for (int l = 0; l < lanes; l++) {
                x[l] = m[l] == -INFINITY ? -INFINITY : x[l] + slope * m[l];
            }
        }
        for (int l = 0; l < lanes; l++) {
            max[l] = x[l] > max[l] ? x[l] : max[l];
        }
    }
}

static inline void exponents(float *s, int64_t n, int lanes, const float *max, float *sum) {
    for (int64_t c = 0; c < n; c++) {
        for (int l = 0; l < lanes; l++) {
            const float x = s[c * lanes + l] - max[l];
            const float e = exp_neg(x < -87.0f ? -87.0f : x);
            s[c * lanes + l] = x < -87.0f ? 0.0f : e;
            sum[l] += s[c * lanes + l];
        }
    }
}

/* The same, with the image part and its entropy term: sum of e ln e, where ln e is the score itself. Lanes are rows
 * that share a cell's flag (step 0), or cells with a flag each (step 1). */
static inline void exponents_flagged(float *s, int64_t n, int lanes, const float *flag, int step, const float *max,
                                     struct lv_stats *part) {
    for (int64_t c = 0; c < n; c++) {
        for (int l = 0; l < lanes; l++) {
            float x = s[c * lanes + l] - max[l];
            const bool gone = x < -87.0f;
            x = gone ? -87.0f : x;
            float e = exp_neg(x);
            e = gone ? 0.0f : e;
            s[c * lanes + l] = e;
            const float on = step != 0 ? flag[c * lanes + l] : flag[c];
            part->sum[l] += e;
            part->image[l] += on * e;
            part->slog[l] += on * e * x;
        }
    }
}

static void finish(float *s, int64_t n, const struct lv_softmax *o, struct lv_stats *st) {
    for (int64_t c = 0; c < n; c += 256) { /* partial sums keep long rows exact */
        const int64_t m = n - c < 256 ? n - c : 256;
        struct lv_stats part;
        memset(&part, 0, sizeof part);
        if (o->flag != NULL) {
            exponents_flagged(s + c * LV_LANES, m, LV_LANES, o->flag + c, 0, st->max, &part);
        } else {
            exponents(s + c * LV_LANES, m, LV_LANES, st->max, part.sum);
        }
        for (int l = 0; l < LV_LANES; l++) {
            st->sum[l] += part.sum[l];
            st->image[l] += part.image[l];
            st->slog[l] += part.slog[l];
        }
    }
}

static void softmax(float *s, int64_t n, const struct lv_softmax *o, struct lv_stats *st) {
    memset(st, 0, sizeof *st);
    float max[LV_LANES];
    for (int l = 0; l < LV_LANES; l++) {
        max[l] = o->sink != NULL ? *o->sink : -INFINITY;
    }
    cap_and_mask(s, n, LV_LANES, o, max);
    for (int l = 0; l < LV_LANES; l++) {
        st->max[l] = max[l] == -INFINITY ? 0.0f : max[l]; /* a row that sees nothing gets only zeros */
        st->sum[l] = o->sink != NULL ? expf(*o->sink - st->max[l]) : 0.0f;
    }
    finish(s, n, o, st);
}

/* Cells of one row in the lanes: n lanes of LV_LANES, or n of one for the rest. */
static inline void row_part(float *s, int64_t n, int lanes, const float *flag, const float *max, struct lv_stats *st) {
    struct lv_stats part;
    memset(&part, 0, sizeof part);
    if (flag != NULL) {
        exponents_flagged(s, n, lanes, flag, 1, max, &part);
    } else {
        exponents(s, n, lanes, max, part.sum);
    }
    st->sum[0] += tree(part.sum);
    st->image[0] += tree(part.image);
    st->slog[0] += tree(part.slog);
}

static void softmax_row(float *s, int64_t n, const struct lv_softmax *o, struct lv_stats *st) {
    memset(st, 0, sizeof *st);
    float max = o->sink != NULL ? *o->sink : -INFINITY;
    cap_and_mask(s, n, 1, o, &max);
    st->max[0] = max == -INFINITY ? 0.0f : max;
    st->sum[0] = o->sink != NULL ? expf(*o->sink - st->max[0]) : 0.0f;
    float same[LV_LANES];
    for (int l = 0; l < LV_LANES; l++) {
        same[l] = st->max[0];
    }
    const int64_t step = 256 * LV_LANES;
    const int64_t full = n / LV_LANES * LV_LANES;
    for (int64_t c = 0; c < full; c += step) {
        const int64_t m = full - c < step ? full - c : step;
        row_part(s + c, m / LV_LANES, LV_LANES, o->flag != NULL ? o->flag + c : NULL, same, st);
    }
    row_part(s + full, n - full, 1, o->flag != NULL ? o->flag + full : NULL, same, st);
}

static void add(float *out, const float *e, const int32_t *cell, const int32_t *image, int64_t n, const float *w) {
    for (int64_t j = 0; j < n; j++) {
        const float *x = e + (int64_t)cell[j] * LV_LANES;
        float t[LV_LANES];
        for (int l = 0; l < LV_LANES; l++) {
            t[l] = x[l] * w[l];
        }
        out[image[j]] += tree(t);
    }
}

static void top(float *out, const float *e, const int32_t *cell, const int32_t *image, int64_t n, const float *w) {
    for (int64_t j = 0; j < n; j++) {
        const float *x = e + (int64_t)cell[j] * LV_LANES;
        float best = out[image[j]];
        for (int l = 0; l < LV_LANES; l++) {
            const float p = x[l] * w[l];
            best = p > best ? p : best;
        }
        out[image[j]] = best;
    }
}

const struct lv_kernels LV_KERNELS = {
    .name = LV_STR(LV_KERNELS),
    .from_f16 = from_f16,
    .scores = scores,
    .dot = dot,
    .dots_f16 = dots_f16,
    .softmax = softmax,
    .softmax_row = softmax_row,
    .add = add,
    .top = top,
};
