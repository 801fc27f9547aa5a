/* y = x W^T + bias with weights and inputs of 8 bits, sums exact in 32.
 *
 * GROUP inputs at a time share a scale, in each output's weights and in each token's inputs, which are quantised here. (With one
 * scale for a whole token perplexity rises by several per cent: a few inputs are far larger than the rest.) Weights are kept with
 * 128 added, as the instructions multiply unsigned by signed bytes; the sum of the inputs takes it off again:
 *
 *     y[n] = sum over groups g of scale[n][g] * s[g] * (sum over k in g of (w[n][k] + 128) * q[k]  -  128 * sum of q[k])
 *
 * Panels as in cpu_linear.c, four inputs together: [outputs / PANEL][inputs / 4][PANEL][4], inputs padded to whole groups;
 * scales: [outputs / PANEL][groups][PANEL].
 */
#include "cpu_vec.h"

#if VL == 8
#define TILE 4
#else
#define TILE 8
#endif
#define WIDE 3
#define PANEL (WIDE * VL)
#define GROUP 64
#define AHEAD 2048 /* bytes */

typedef uint32_t vu __attribute__((vector_size(VL * 4), aligned(4), may_alias));

typedef struct {
    float scale;
    int32_t correction; /* -128 * sum of the group's inputs */
} Group;

INLINE vi word(const void *at) {
    int32_t read;
    memcpy(&read, at, sizeof read);
    return (vi)splat(0) + read;
}

/* Four signed inputs, the same for every output, as `quantise` has put them: in the order and the type in which they are multiplied. */
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || VL == 4
typedef int8_t Kept;
typedef vi Inputs;
INLINE int place(int input) { return input; }
INLINE Inputs inputs_of(const Kept *four) { return word(four); }
#else
typedef int16_t Kept;
typedef struct {
    vi even, odd; /* as 16-bit pairs: inputs 0 and 2, inputs 1 and 3 */
} Inputs;
INLINE int place(int input) { return (input & ~3) + (input & 1) * 2 + (input >> 1 & 1); }
INLINE Inputs inputs_of(const Kept *four) { return (Inputs){word(four), word(four + 2)}; }
#endif

/* sum[n] + the products of the four weights of each output with the four inputs; nothing here can saturate */
INLINE vi dot(vi sum, vu weights, Inputs x) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
#elif defined(__AVXVNNI__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, (__m256i)x);
#elif VL == 16
    sum += (vi)_mm512_madd_epi16((__m512i)(weights & 0x00ff00ffu), (__m512i)x.even);
    return sum + (vi)_mm512_madd_epi16((__m512i)(weights >> 8 & 0x00ff00ffu), (__m512i)x.odd);
#elif VL == 8
    sum += (vi)_mm256_madd_epi16((__m256i)(weights & 0x00ff00ffu), (__m256i)x.even);
    return sum + (vi)_mm256_madd_epi16((__m256i)(weights >> 8 & 0x00ff00ffu), (__m256i)x.odd);
#else
    for (int i = 0; i < 4; i++) sum += (vi)(weights >> (8 * i) & 0xffu) * (x << (24 - 8 * i) >> 24);
    return sum;
#endif
}

INLINE void tile(int tokens, const Kept *x, const Group *groups, const uint8_t *w, const float *scale, vf acc[][WIDE], int64_t count) {
    vf total[TILE][WIDE];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int n = 0; n < WIDE; n++) total[t][n] = splat(0);
    for (int64_t g = 0; g < count; g++) {
        vi sums[TILE][WIDE];
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int n = 0; n < WIDE; n++) sums[t][n] = (vi)splat(0) + groups[t * count + g].correction;
        for (int k = 0; k < GROUP; k += 4, w += PANEL * 4) {
            vu row[WIDE];
            UNROLL for (int n = 0; n < WIDE; n++) {
                row[n] = *(const vu *)(w + n * VL * 4);
                __builtin_prefetch(w + n * VL * 4 + AHEAD);
            }
            UNROLL for (int t = 0; t < tokens; t++) {
                Inputs in = inputs_of(x + (t * count + g) * GROUP + k);
                UNROLL for (int n = 0; n < WIDE; n++) sums[t][n] = dot(sums[t][n], row[n], in);
            }
        }
        UNROLL for (int n = 0; n < WIDE; n++) {
            vf s = load(scale + g * PANEL + n * VL);
            UNROLL for (int t = 0; t < tokens; t++)
                total[t][n] += splat(groups[t * count + g].scale) * s * __builtin_convertvector(sums[t][n], vf);
        }
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int n = 0; n < WIDE; n++) acc[t][n] = total[t][n];
}

/* One token: n inputs, the last group padded with zeros. */
static void quantise(const float *x, int64_t n, Kept *kept, Group *groups) {
    const vf magic = splat(12582912.0f); /* adding it rounds */
    for (int64_t from = 0; from < n; from += GROUP, kept += GROUP, groups++) {
        float padded[GROUP] = {0};
        const float *in = x + from;
        if (n - from < GROUP) in = memcpy(padded, in, (n - from) * sizeof(float));
        vf most = splat(0), poison = splat(0); /* NaN where an input is not finite: then the result is NaN, too */
        for (int i = 0; i < GROUP; i += VL) {
            vf v = load(in + i);
            most = vmax(vmax(v, -v), most);
            poison += v * splat(0);
        }
        float top = largest(most);
        vf inverse = splat(top > 0 ? 127.0f / top : 0.0f);
        vi all = (vi)splat(0);
        for (int i = 0; i < GROUP; i += VL) {
            vi q = (vi)(load(in + i) * inverse + magic) - (vi)magic;
            UNROLL for (int j = 0; j < VL; j++) kept[i + place(j)] = (Kept)q[j];
            all += q;
        }
        int32_t bytes_sum = 0;
        for (int i = 0; i < VL; i++) bytes_sum += all[i];
        groups->scale = (top + sum(poison)) / 127.0f;
        groups->correction = -128 * bytes_sum;
    }
}

/* x [tokens, inputs], w and scale packed, bias [outputs] or NULL, y [tokens, outputs];
 * work: 136 bytes for each token and group, at an address that is a multiple of 4. */
void quire_linear_int8(const float *x, const uint8_t *w, const float *scale, const float *bias, float *y, void *work, int64_t tokens, int64_t outputs,
                       int64_t inputs, int threads) {
    int64_t panels = (outputs + PANEL - 1) / PANEL, tiles = (tokens + TILE - 1) / TILE, count = (inputs + GROUP - 1) / GROUP;
    Group *groups = work;
    Kept *kept = (Kept *)(groups + tokens * count);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) quantise(x + t * inputs, inputs, kept + t * count * GROUP, groups + t * count);
#pragma omp for schedule(dynamic, 1)
        for (int64_t panel = 0; panel < panels; panel++) {
            const uint8_t *weights = w + panel * PANEL * count * GROUP;
            const float *scales = scale + panel * PANEL * count;
            int64_t n0 = panel * PANEL, width = outputs - n0 < PANEL ? outputs - n0 : PANEL;
            for (int64_t i = 0; i < tiles; i++) {
                int64_t first = tokens * i / tiles;
                int height = (int)(tokens * (i + 1) / tiles - first);
                const Kept *in = kept + first * count * GROUP;
                const Group *grouped = groups + first * count;
                vf acc[TILE][WIDE];
                WITH_CONSTANT(N, height, TILE, tile(N, in, grouped, weights, scales, acc, count))
                for (int t = 0; t < height; t++) {
                    float *out = y + (first + t) * outputs + n0, *sums = (float *)acc[t];
                    for (int n = 0; n < width; n++) out[n] = sums[n] + (bias ? bias[n0 + n] : 0.0f);
                }
            }
        }
    }
}
