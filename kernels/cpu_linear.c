/* y = x W^T + bias in float32.
 *
 * W is packed in panels: [outputs / PANEL][inputs][PANEL], the last panel padded with zeros. One token then reads the
 * weights once, in the order of memory, which is all that can be done. At many tokens, BLOCK of them go through RUN inputs of a
 * panel, which stay in the first-level cache, before the next RUN; a tile of TILE tokens x PANEL outputs stays in registers.
 * Each result is the same chain of multiply-adds over the inputs whatever the tile: a token's result never depends on its
 * batch or on the number of threads.
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
#define BLOCK (16 * TILE)
#define MANY 4     /* tiles that share the fetching of what comes next */
#define AHEAD 2048 /* bytes of weights that fewer ask for in advance; the hardware stops at each page */

/* total [tokens][PANEL] = x [tokens, run] times `run` inputs of a panel, added to what is there unless they are the first. */
INLINE void tile(int tokens, int ahead, const float *x, const float *w, float *total, int64_t inputs, int64_t run, int first) {
    vf sums[TILE][WIDE];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int n = 0; n < WIDE; n++) sums[t][n] = splat(0);
    _Pragma("GCC unroll 4") for (int64_t k = 0; k < run; k++) {
        vf row[WIDE];
        UNROLL for (int n = 0; n < WIDE; n++) {
            row[n] = load(w + k * PANEL + n * VL);
            if (ahead) __builtin_prefetch((const char *)(w + k * PANEL + n * VL) + AHEAD);
        }
        UNROLL for (int t = 0; t < tokens; t++) {
            vf v = splat(x[t * inputs + k]);
            UNROLL for (int n = 0; n < WIDE; n++) sums[t][n] = fused(v, row[n], sums[t][n]);
        }
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int n = 0; n < WIDE; n++) {
            float *to = total + t * PANEL + n * VL;
            store(to, first ? sums[t][n] : load(to) + sums[t][n]);
        }
}

/* Line i of `of` equal shares of the RUN weights that follow: the others fetch theirs meanwhile. */
INLINE void fetch(const float *next, int64_t i, int64_t of) {
    const int64_t floats = 16, lines = RUN * PANEL / floats;
    for (int64_t line = lines * i / of; line < lines * (i + 1) / of; line++) __builtin_prefetch(next + line * floats);
}

/* total [tokens][PANEL] = x [tokens, inputs] times one panel */
static void block(int64_t tokens, const float *x, const float *w, float *total, int64_t inputs) {
    int64_t tiles = (tokens + TILE - 1) / TILE;
    for (int64_t k = 0; k < inputs; k += RUN) {
        int64_t run = inputs - k < RUN ? inputs - k : RUN;
        for (int64_t i = 0; i < tiles; i++) {
            int64_t first = tokens * i / tiles;
            int count = (int)(tokens * (i + 1) / tiles - first);
            const float *in = x + first * inputs + k, *weights = w + k * PANEL;
            float *to = total + first * PANEL;
            if (tiles >= MANY) {
                fetch(weights + RUN * PANEL, i, tiles);
                WITH_CONSTANT(N, count, TILE, tile(N, 0, in, weights, to, inputs, run, k == 0))
            } else {
                WITH_CONSTANT(N, count, TILE, tile(N, 1, in, weights, to, inputs, run, k == 0))
            }
        }
    }
}

/* x [tokens, inputs], w packed, bias [outputs] or NULL, y [tokens, outputs] */
void quire_linear(const float *x, const float *w, const float *bias, float *y, int64_t tokens, int64_t outputs, int64_t inputs, int threads) {
    int64_t panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1 + panels / (8 * threads))
    for (int64_t panel = 0; panel < panels; panel++) {
        float total[BLOCK * PANEL];
        int64_t n0 = panel * PANEL, width = outputs - n0 < PANEL ? outputs - n0 : PANEL;
        for (int64_t first = 0; first < tokens; first += BLOCK) {
            int64_t count = tokens - first < BLOCK ? tokens - first : BLOCK;
            block(count, x + first * inputs, w + n0 * inputs, total, inputs);
            for (int64_t t = 0; t < count; t++) {
                float *out = y + (first + t) * outputs + n0, *sums = total + t * PANEL;
                if (width == PANEL && !bias)
                    for (int n = 0; n < WIDE; n++) store(out + n * VL, load(sums + n * VL));
                else
                    for (int n = 0; n < width; n++) out[n] = bias ? sums[n] + bias[n0 + n] : sums[n];
            }
        }
    }
}

/* outputs in one panel */
int quire_panel(void) { return PANEL; }
