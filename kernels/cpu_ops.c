/* The small operations between the linears, in float32: RMSNorm (with the residual added), SiLU * up, RoPE with the KV write.
 * A token's work is one thread's, in a fixed order. Few tokens are not worth waking the other threads for.
 */
#include "cpu_vec.h"

#define WORTH_THREADS 16384 /* floats */

/* out = x / sqrt(mean(x^2) + eps) * weight over n floats; in place is allowed. */
INLINE void norm(const float *x, const float *weight, float *out, int64_t n, float eps) {
    vf squares = splat(0);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < n; i++) total += x[i] * x[i];
    float scale = 1.0f / sqrtf(total / (float)n + eps);
    for (i = 0; i + VL <= n; i += VL) store(out + i, load(x + i) * splat(scale) * load(weight + i));
    for (; i < n; i++) out[i] = x[i] * scale * weight[i];
}

/* x, out [tokens, n]. With a residual [tokens, n]: stream = x + residual, out = norm(stream). */
void quire_rms_norm(const float *x, const float *residual, const float *weight, float *out, float *stream, int64_t tokens, int64_t n, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * n > WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) {
        const float *in = x + t * n;
        if (residual) {
            for (int64_t i = 0; i < n; i++) stream[t * n + i] = in[i] + residual[t * n + i];
            in = stream + t * n;
        }
        norm(in, weight, out + t * n, n, eps);
    }
}

/* gate_up [tokens, 2 n] -> out [tokens, n] = gate / (1 + exp(-gate)) * up */
void quire_silu_mul(const float *gate_up, float *out, int64_t tokens, int64_t n, int threads) {
    const vf log2e = splat(-1.44269504f), most = splat(126.0f), one = splat(1.0f);
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * n > WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) {
        const float *gate = gate_up + t * 2 * n, *up = gate + n;
        float rest[3][VL] = {{0}};
        for (int64_t i = 0; i < n; i += VL) {
            int64_t count = n - i < VL ? n - i : VL;
            const float *g = gate + i, *u = up + i;
            float *y = out + t * n + i;
            if (count < VL) {
                memcpy(rest[0], g, count * sizeof(float));
                memcpy(rest[1], u, count * sizeof(float));
                g = rest[0], u = rest[1], y = rest[2];
            }
            vf power = load(g) * log2e;
            power = pick(power > most, most, power);
            store(y, load(g) / (one + exp2_(power)) * load(u));
            if (count < VL) memcpy(out + t * n + i, y, count * sizeof(float));
        }
    }
}

INLINE void rotate(const float *x, const float *cos_sin, float *out, int64_t half) {
    const float *cosine = cos_sin, *sine = cos_sin + half;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        out[i] = a * cosine[i] - b * sine[i];
        out[i + half] = b * cosine[i] + a * sine[i];
    }
}

/* qkv [tokens, (heads + 2 kv_heads) * dim]; q [tokens, heads, dim] is written, and K and V go to their slots in pages,
 * whose strides (in floats) are those of a page, a KV head, and K to V; a token's stride is dim. q_norm, k_norm [dim] or NULL.
 * Returns the number of slots or positions that lie outside; those tokens are left out. */
int64_t quire_rope_and_write_kv(const float *qkv, const int64_t *positions, const float *cos_sin, float *pages, const int64_t *slots, float *q,
                                const float *q_norm, const float *k_norm, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim,
                                int64_t page_count, int64_t page_size, int64_t page_stride, int64_t head_stride, int64_t kv_stride,
                                int64_t max_positions, float eps, int threads) {
    int64_t outside = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : outside) if (tokens * (heads + 2 * kv_heads) * dim > WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) {
        int64_t slot = slots[t];
        if (slot < 0 || slot >= page_count * page_size || positions[t] < 0 || positions[t] >= max_positions) {
            outside++;
            continue;
        }
        const float *x = qkv + t * (heads + 2 * kv_heads) * dim, *angle = cos_sin + positions[t] * dim;
        float *kv = pages + slot / page_size * page_stride + slot % page_size * dim;
        float normed[256];
        for (int64_t h = 0; h < heads + kv_heads; h++, x += dim) {
            const float *weight = h < heads ? q_norm : k_norm, *in = x;
            if (weight) {
                norm(x, weight, normed, dim, eps);
                in = normed;
            }
            rotate(in, angle, h < heads ? q + (t * heads + h) * dim : kv + (h - heads) * head_stride, dim / 2);
        }
        for (int64_t h = 0; h < kv_heads; h++, x += dim) memcpy(kv + h * head_stride + kv_stride, x, dim * sizeof(float));
    }
    return outside;
}
