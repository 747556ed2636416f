/* dispatch.c - chooses the kernels this machine can run. */
#include "kernels.h"

const struct lv_kernels *lv_kernels_pick(void) {
#ifdef LV_HAVE_X86_VARIANTS
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        return &lv_kernels_avx512;
    }
    /* every AVX2 machine converts half floats (F16C came one generation earlier) */
    if (avx2) {
        return &lv_kernels_avx2;
    }
#endif
    return &lv_kernels_base;
}
