/* cells.c - which KV cell holds which image token, read from the graph's own index inputs.
 *
 * One map per KV cache. A cache is known by the layers that share one index input ("cache_k_l3" -> layer 3): two
 * caches of one model (sliding window) hold different layers and have an index input each. */
#include <stdlib.h>
#include <string.h>

#include "tap_internal.h"

static int layer_in(const char *name) {
    const char *p = strstr(name, "cache_k_l");
    return p != NULL && p[9] >= '0' && p[9] <= '9' ? atoi(p + 9) : -1;
}

int lv_cache_layer(const struct ggml_tensor *t) {
    int layer = t->view_src != NULL ? layer_in(t->view_src->name) : -1;
    if (layer < 0) {
        layer = layer_in(t->name); /* a cast or a scheduler's copy is no view any more */
    }
    return layer < LV_MAX_LAYERS ? layer : -1;
}

void lv_maps_begin(lv_tap *tap) {
    for (int i = 0; i < tap->n_maps; i++) {
        tap->maps[i].n_done = 0;
    }
}

void lv_maps_drop(lv_tap *tap, int32_t n_image) {
    for (int i = 0; i < tap->n_maps; i++) {
        struct lv_map *map = &tap->maps[i];
        map->holds = false;
        for (int64_t c = 0; c < map->n; c++) {
            map->image[c] = map->image[c] < n_image ? map->image[c] : -1;
            map->holds = map->holds || map->image[c] >= 0;
        }
        map->fresh = false;
    }
}

void lv_maps_free(lv_tap *tap) {
    for (int i = 0; i < tap->n_maps; i++) {
        free(tap->maps[i].image);
        free(tap->maps[i].cell.data);
        free(tap->maps[i].pair_image.data);
        free(tap->maps[i].flag.data);
    }
    tap->n_maps = 0;
}

/* The map of a layer's cache. A layer never met before joins the map that this run filled from the same input. */
static struct lv_map *map_for(lv_tap *tap, int layer, const struct ggml_tensor *index) {
    if (tap->map_of_layer[layer] >= 0) {
        return &tap->maps[tap->map_of_layer[layer]];
    }
    for (int i = 0; i < tap->n_maps; i++) {
        for (int j = 0; j < tap->maps[i].n_done; j++) {
            if (tap->maps[i].done[j] == index) {
                tap->map_of_layer[layer] = (int8_t)i;
                return &tap->maps[i];
            }
        }
    }
    if (tap->n_maps == LV_MAX_MAPS) {
        lv_fail(tap, LV_E_GRAPH, "layer %d: more than %d KV caches", layer, LV_MAX_MAPS);
        return NULL;
    }
    memset(&tap->maps[tap->n_maps], 0, sizeof tap->maps[0]);
    tap->map_of_layer[layer] = (int8_t)tap->n_maps;
    return &tap->maps[tap->n_maps++];
}

static bool map_grow(lv_tap *tap, struct lv_map *map, int64_t n) {
    if (n <= map->n) {
        return true;
    }
    int32_t *image = realloc(map->image, (size_t)n * sizeof *image);
    if (image == NULL) {
        lv_fail(tap, LV_E_MEMORY, "no memory for a map of %lld cells", (long long)n);
        return false;
    }
    for (int64_t c = map->n; c < n; c++) {
        image[c] = -1;
    }
    map->image = image;
    map->n = n;
    return true;
}

static int64_t index_at(const void *data, enum ggml_type type, int64_t i) {
    return type == GGML_TYPE_I64 ? ((const int64_t *)data)[i] : ((const int32_t *)data)[i];
}

/* index_n cells are written; the cache has room for n_cells. */
static void map_enter(lv_tap *tap, struct lv_map *map, const struct ggml_tensor *index, int64_t n_cells,
                      const int32_t *image) {
    const void *data = lv_host(tap, &tap->fetch[0], index, ggml_nbytes(index));
    if (data == NULL || !map_grow(tap, map, n_cells)) {
        return;
    }
    for (int64_t i = 0; i < index->ne[0]; i++) {
        const int64_t cell = index_at(data, index->type, i);
        if (cell < 0 || cell >= n_cells) {
            lv_fail(tap, LV_E_GRAPH, "'%s' row %lld names cell %lld of %lld", index->name, (long long)i,
                    (long long)cell, (long long)n_cells);
            return;
        }
        map->image[cell] = image != NULL ? image[i] : -1;
        map->holds = map->holds || map->image[cell] >= 0;
    }
    map->fresh = false;
}

void lv_map_store(lv_tap *tap, const struct ggml_tensor *node, const int32_t *image, int32_t n_rows) {
    const int layer = lv_cache_layer(node);
    const struct ggml_tensor *index = node->src[1];
    if (layer < 0 || index == NULL) {
        return; /* V, or no KV cache at all */
    }
    struct lv_map *map = map_for(tap, layer, index);
    if (map == NULL) {
        return;
    }
    if (tap->phase == LV_LLM) {
        tap->stored[layer] = 1;
    }
    const int fresh = lv_once(map->done, &map->n_done, index);
    if ((fresh == 0 && tap->phase == LV_LLM) || (image == NULL && !map->holds)) {
        return; /* entered already, or nothing to forget: a read from a GPU is not for nothing */
    }
    const bool known = index->type == GGML_TYPE_I64 || index->type == GGML_TYPE_I32;
    if (!known || !ggml_is_contiguous(index) || ggml_nelements(index) != index->ne[0]) {
        lv_fail(tap, LV_E_GRAPH, "layer %d: cell index '%s' is no list of integers", layer, index->name);
        return;
    }
    if (image != NULL && index->ne[0] != n_rows) {
        lv_fail(tap, LV_E_GRAPH, "layer %d: %lld rows are stored, but the batch was described with %d (micro-batch?)",
                layer, (long long)index->ne[0], n_rows);
        return;
    }
    const struct ggml_tensor *root = node->view_src != NULL ? node->view_src : node;
    map_enter(tap, map, index, ggml_nelements(root) / root->ne[0], image);
}

static bool build_pairs(lv_tap *tap, struct lv_map *map, int64_t base, int64_t n_kv) {
    const size_t n = (size_t)n_kv;
    if (!lv_grow(tap, &map->cell, n * sizeof(int32_t)) || !lv_grow(tap, &map->pair_image, n * sizeof(int32_t)) ||
        !lv_grow(tap, &map->flag, n * sizeof(float))) {
        return false;
    }
    int32_t *cell = map->cell.data, *image = map->pair_image.data;
    float *flag = map->flag.data;
    map->n_pairs = 0;
    for (int64_t c = 0; c < n_kv; c++) {
        const int32_t token = base + c < map->n ? map->image[base + c] : -1;
        flag[c] = token >= 0 ? 1.0f : 0.0f;
        if (token >= 0) {
            cell[map->n_pairs] = (int32_t)c;
            image[map->n_pairs++] = token;
        }
    }
    map->n_flag = n_kv;
    map->base = base;
    map->fresh = true;
    return true;
}

const struct lv_map *lv_map_pairs(lv_tap *tap, int cache_layer, int64_t base, int64_t n_kv) {
    if (cache_layer < 0 || tap->map_of_layer[cache_layer] < 0) {
        lv_fail(tap, LV_E_GRAPH, "attention keys come from no known KV cache (cache layer %d)", cache_layer);
        return NULL;
    }
    struct lv_map *map = &tap->maps[tap->map_of_layer[cache_layer]];
    if (base < 0 || base + n_kv > map->n) {
        lv_fail(tap, LV_E_GRAPH, "cache layer %d: cells %lld..%lld of %lld", cache_layer, (long long)base,
                (long long)(base + n_kv), (long long)map->n);
        return NULL;
    }
    const bool ready = map->fresh && map->n_flag == n_kv && map->base == base;
    return ready || build_pairs(tap, map, base, n_kv) ? map : NULL;
}
