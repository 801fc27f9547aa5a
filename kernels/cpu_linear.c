/* y = x W^T + bias in float32.
 *
 * W is packed in panels: [outputs / PANEL][inputs][PANEL], the last panel padded with zeros. One token then reads the
 * weights once, in the order of memory, which is all that can be done; at many tokens a tile of TILE tokens x PANEL
 * outputs stays in registers and the panel in the second-level cache. Each result is the same chain of multiply-adds
 * over the inputs whatever the tile: a token's result never depends on its batch or on the number of threads.
 */
#include "cpu_vec.h"

#if VL == 8
#define TILE 4 /* 12 sums + 3 weights + 1 input: the 16 registers of AVX2 */
#else
#define TILE 8
#endif
#define WIDE 3
#define PANEL (WIDE * VL)
#define RUN 128    /* products in one chain; then it is added to the total, which keeps rounding small */
#define AHEAD 2048 /* bytes of weights asked for in advance; the hardware stops at each page */

/* acc [tokens][WIDE] = x [tokens, inputs] times one panel. */
INLINE void tile(int tokens, const float *x, const float *w, vf acc[][WIDE], int64_t inputs) {
    for (int64_t from = 0; from < inputs; from += RUN) {
        int64_t to = from + RUN < inputs ? from + RUN : inputs;
        vf sums[TILE][WIDE];
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int n = 0; n < WIDE; n++) sums[t][n] = splat(0);
        for (int64_t k = from; k < to; k++) {
            vf row[WIDE];
            UNROLL for (int n = 0; n < WIDE; n++) {
                row[n] = load(w + k * PANEL + n * VL);
                __builtin_prefetch((const char *)(w + k * PANEL + n * VL) + AHEAD);
            }
            UNROLL for (int t = 0; t < tokens; t++) {
                vf v = splat(x[t * inputs + k]);
                UNROLL for (int n = 0; n < WIDE; n++) sums[t][n] += v * row[n];
            }
        }
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int n = 0; n < WIDE; n++) acc[t][n] = from ? acc[t][n] + sums[t][n] : sums[t][n];
    }
}

/* x [tokens, inputs], w packed, bias [outputs] or NULL, y [tokens, outputs] */
void quire_linear(const float *x, const float *w, const float *bias, float *y, int64_t tokens, int64_t outputs, int64_t inputs, int threads) {
    int64_t panels = (outputs + PANEL - 1) / PANEL, tiles = (tokens + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t panel = 0; panel < panels; panel++) {
        const float *weights = w + panel * PANEL * inputs;
        int64_t n0 = panel * PANEL, width = outputs - n0 < PANEL ? outputs - n0 : PANEL;
        for (int64_t i = 0; i < tiles; i++) {
            int64_t first = tokens * i / tiles;
            int count = (int)(tokens * (i + 1) / tiles - first);
            const float *in = x + first * inputs;
            vf acc[TILE][WIDE];
            switch (count) {
            case 1: tile(1, in, weights, acc, inputs); break;
            case 2: tile(2, in, weights, acc, inputs); break;
            case 3: tile(3, in, weights, acc, inputs); break;
            case 4: tile(4, in, weights, acc, inputs); break;
#if TILE > 4
            case 5: tile(5, in, weights, acc, inputs); break;
            case 6: tile(6, in, weights, acc, inputs); break;
            case 7: tile(7, in, weights, acc, inputs); break;
            case 8: tile(8, in, weights, acc, inputs); break;
#endif
            }
            for (int t = 0; t < count; t++) {
                float *out = y + (first + t) * outputs + n0, *sums = (float *)acc[t];
                if (width == PANEL && !bias)
                    for (int n = 0; n < WIDE; n++) store(out + n * VL, acc[t][n]);
                else
                    for (int n = 0; n < width; n++) out[n] = bias ? sums[n] + bias[n0 + n] : sums[n];
            }
        }
    }
}

/* outputs in one panel */
int quire_panel(void) { return PANEL; }
