/* guard.c - refuses libraries other than those whose headers this file was compiled with. */
#include <stdio.h>
#include <string.h>

#include "ggml-backend.h"
#include "localvlm_tap.h"

#ifndef LV_GGML_VERSION
#define LV_GGML_VERSION "" /* unknown at build time: only the layout is compared */
#endif
#ifndef LV_GGML_OVERHEAD
#define LV_GGML_OVERHEAD 0
#endif

int lv_tap_abi(void) { return LV_TAP_ABI; }

/* The numbers of an enum move when one is inserted: compare the names that the library gives them. */
static const char *moved_enum(void) {
    static const struct {
        enum ggml_op op;
        const char *name;
    } ops[] = {
        {GGML_OP_FLASH_ATTN_EXT, "FLASH_ATTN_EXT"}, {GGML_OP_SOFT_MAX, "SOFT_MAX"}, {GGML_OP_SET_ROWS, "SET_ROWS"},
        {GGML_OP_GET_ROWS, "GET_ROWS"},             {GGML_OP_ROPE, "ROPE"},         {GGML_OP_MUL_MAT, "MUL_MAT"},
    };
    for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++) {
        if (strcmp(ggml_op_name(ops[i].op), ops[i].name) != 0) {
            return ops[i].name;
        }
    }
    return strcmp(ggml_type_name(GGML_TYPE_I64), "i64") == 0 ? NULL : "i64";
}

const char *lv_tap_guard(void) {
    static char message[256];
    const char *loaded = ggml_version();
    if (LV_GGML_VERSION[0] != '\0' && strcmp(loaded, LV_GGML_VERSION) != 0) {
        snprintf(message, sizeof message, "built for ggml %s, but ggml %s is loaded", LV_GGML_VERSION, loaded);
        return message;
    }
    /* the overhead holds a private header besides the tensor itself */
    const size_t overhead = LV_GGML_OVERHEAD;
    const size_t seen = ggml_tensor_overhead();
    if ((overhead != 0 && overhead != seen) || seen < sizeof(struct ggml_tensor)) {
        snprintf(message, sizeof message, "built for a ggml whose tensors take %zu bytes, but ggml %s has %zu",
                 overhead != 0 ? overhead : sizeof(struct ggml_tensor), loaded, seen);
        return message;
    }
    const char *moved = moved_enum();
    if (moved != NULL) {
        snprintf(message, sizeof message, "built for a ggml %s in which %s has another number than in the %s loaded",
                 LV_GGML_VERSION, moved, loaded);
        return message;
    }
    return NULL;
}
