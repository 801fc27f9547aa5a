/* Causal attention over pages, float32: decode rows, prefill rows and mixtures in one function.
 *
 * A row's queries are cut into tiles of up to ROWS (query, head) pairs that share one KV head, and its keys into blocks of
 * BLOCK at fixed positions. For each block the scores, their maximum m, the weights' sum l and the weighted values o are
 * computed from nothing, and folded into the tile's running (m, l, o), block after block:
 *
 *     m' = max(m, mb)    l' = l 2^(m-m') + lb 2^(mb-m')    o' = o 2^(m-m') + ob 2^(mb-m')
 *
 * Where there are fewer tiles than would keep the threads busy, the blocks are computed in parallel first and then folded, in
 * the same order: a token's result is the same bits alone, in a batch, in any chunk and with any number of threads.
 * Keys that no query of the tile may see are never read, so unwritten memory cannot leak.
 */
#include "cpu_vec.h"

#include <stdlib.h>

#define BLOCK 64  /* keys */
#define ROWS 48   /* (query, head) pairs in a tile */
#define MAX_DIM 256
#define TALL 6
#define MOST 4 /* vectors in a register tile */
#if VL == 8
#define WIDE(rows) ((rows) <= 3 ? MOST : 2) /* vectors in one of so many rows: 12 sums leave 4 of AVX2's registers */
#else
#define WIDE(rows) MOST
#endif

typedef struct {
    const float *q, *pages;
    float *out;
    const int32_t *row_starts, *kv_lens, *tables;
    int64_t rows, heads, kv_heads, dim, page_size, page_stride, head_stride, kv_stride, table_width, window;
    float scale;
} Batch;

/* Queries [first, first + count) of a row, for the heads [head, head + group) that share kv_head. */
typedef struct {
    int64_t token, kv_head, head, group, count;
    int64_t position;  /* of the first query */
    int64_t begin, end; /* keys that some query sees */
    const int32_t *table;
} Tile;

typedef struct {
    float m[ROWS], l[ROWS], o[ROWS * MAX_DIM];
} State;

typedef struct {
    float q[ROWS * MAX_DIM], keys[MAX_DIM * BLOCK], p[ROWS * BLOCK];
} Scratch;

/* Where the keys of a block lie, and the values; `nothing` where the tile may not read. `all` are both as they lie in memory. */
typedef struct {
    const float *key[BLOCK], *value[BLOCK], *all[2 * BLOCK];
    int from, to;
} Block;

static const float nothing[MAX_DIM];

INLINE void fetch(const float *from, int64_t floats) {
    for (int64_t d = 0; d < floats; d += 16) __builtin_prefetch(from + d, 0, 2);
}

/* out[j][i] = in[i][j] for VL rows of VL floats; out's rows are BLOCK apart. */
INLINE void transpose(const float *const *in, int64_t at, float *out) {
#if VL == 16
    __m512 a[16], b[16];
    /* four 128-bit pieces of four rows in each register: a[4 i + k] = rows k, k+4, k+8, k+12, columns 4 i .. 4 i + 3 */
    UNROLL for (int i = 0; i < 4; i++)
        UNROLL for (int k = 0; k < 4; k++) {
            __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(in[k] + at + 4 * i));
            x = _mm512_insertf32x4(x, _mm_loadu_ps(in[k + 4] + at + 4 * i), 1);
            x = _mm512_insertf32x4(x, _mm_loadu_ps(in[k + 8] + at + 4 * i), 2);
            a[4 * i + k] = _mm512_insertf32x4(x, _mm_loadu_ps(in[k + 12] + at + 4 * i), 3);
        }
    UNROLL for (int i = 0; i < 4; i++) {
        b[0] = _mm512_unpacklo_ps(a[4 * i], a[4 * i + 1]);
        b[1] = _mm512_unpackhi_ps(a[4 * i], a[4 * i + 1]);
        b[2] = _mm512_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]);
        b[3] = _mm512_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]);
        _mm512_storeu_ps(out + (4 * i + 0) * BLOCK, _mm512_shuffle_ps(b[0], b[2], 0x44));
        _mm512_storeu_ps(out + (4 * i + 1) * BLOCK, _mm512_shuffle_ps(b[0], b[2], 0xee));
        _mm512_storeu_ps(out + (4 * i + 2) * BLOCK, _mm512_shuffle_ps(b[1], b[3], 0x44));
        _mm512_storeu_ps(out + (4 * i + 3) * BLOCK, _mm512_shuffle_ps(b[1], b[3], 0xee));
    }
#elif VL == 8
    UNROLL for (int i = 0; i < 2; i++) {
        __m256 a[4], b[4];
        UNROLL for (int k = 0; k < 4; k++)
            a[k] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(in[k] + at + 4 * i)), _mm_loadu_ps(in[k + 4] + at + 4 * i), 1);
        b[0] = _mm256_unpacklo_ps(a[0], a[1]);
        b[1] = _mm256_unpackhi_ps(a[0], a[1]);
        b[2] = _mm256_unpacklo_ps(a[2], a[3]);
        b[3] = _mm256_unpackhi_ps(a[2], a[3]);
        _mm256_storeu_ps(out + (4 * i + 0) * BLOCK, _mm256_shuffle_ps(b[0], b[2], 0x44));
        _mm256_storeu_ps(out + (4 * i + 1) * BLOCK, _mm256_shuffle_ps(b[0], b[2], 0xee));
        _mm256_storeu_ps(out + (4 * i + 2) * BLOCK, _mm256_shuffle_ps(b[1], b[3], 0x44));
        _mm256_storeu_ps(out + (4 * i + 3) * BLOCK, _mm256_shuffle_ps(b[1], b[3], 0xee));
    }
#else
    for (int i = 0; i < VL; i++)
        for (int j = 0; j < VL; j++) out[j * BLOCK + i] = in[i][at + j];
#endif
}

/* p[r][0 .. wide * VL) = sum over d of q[r][d] * keys[d][...], for `rows` rows */
INLINE void scores(int rows, int wide, const float *q, const float *keys, float *p, int64_t dim) {
    vf acc[TALL][MOST];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < wide; c++) acc[r][c] = splat(0);
    for (int64_t d = 0; d < dim; d++) {
        vf key[MOST];
        UNROLL for (int c = 0; c < wide; c++) key[c] = load(keys + d * BLOCK + c * VL);
        UNROLL for (int r = 0; r < rows; r++) {
            vf x = splat(q[r * dim + d]);
            UNROLL for (int c = 0; c < wide; c++) acc[r][c] = fused(x, key[c], acc[r][c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < wide; c++) store(p + r * BLOCK + c * VL, acc[r][c]);
}

/* o[r][0 .. wide * VL) = sum over keys j in [from, to) of p[r][j] * values[j][at + ...] */
INLINE void weighted(int rows, int wide, const float *p, const Block *now, const Block *next, int64_t at, float *o, int64_t dim) {
    vf acc[TALL][MOST];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < wide; c++) acc[r][c] = splat(0);
    for (int j = now->from; j < now->to; j++) {
        vf value[MOST];
        fetch(next->all[BLOCK + j] + at, wide * VL);
        UNROLL for (int c = 0; c < wide; c++) value[c] = load(now->value[j] + at + c * VL);
        UNROLL for (int r = 0; r < rows; r++) {
            vf x = splat(p[r * BLOCK + j]);
            UNROLL for (int c = 0; c < wide; c++) acc[r][c] = fused(x, value[c], acc[r][c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < wide; c++) store(o + r * dim + at + c * VL, acc[r][c]);
}

/* Weights of one block in place of its scores; a row sees the keys [from, to). Sets the row's m and l. */
static void softmax(float *p, int from, int to, float *m, float *l) {
    const vf hidden = splat(-INFINITY);
    vf s[BLOCK / VL], top = hidden, total = splat(0);
    for (int c = 0; c < BLOCK / VL; c++) {
        vi key = iota() + c * VL;
        s[c] = pick((key >= from) & (key < to), load(p + c * VL), hidden);
        top = vmax(s[c], top);
    }
    *m = largest(top);
    vf base = splat(*m == -INFINITY ? 0.0f : *m);
    for (int c = 0; c < BLOCK / VL; c++) {
        vf weight = exp2_(s[c] - base);
        store(p + c * VL, weight);
        total += weight;
    }
    *l = sum(total);
}

/* Keys [block * BLOCK, + BLOCK), of which the tile may read those in [begin, end). */
static void locate(const Batch *b, const Tile *t, int64_t block, Block *at) {
    int64_t first = block * BLOCK;
    at->from = (int)(t->begin > first ? t->begin - first : 0), at->to = (int)(t->end - first < BLOCK ? t->end - first : BLOCK);
    for (int j = 0; j < BLOCK; j++) at->key[j] = at->value[j] = at->all[2 * j] = at->all[2 * j + 1] = nothing;
    for (int j = at->from, n = 0; j < at->to;) {
        int run = j;
        int64_t position = first + j, offset = position % b->page_size;
        const float *key = b->pages + t->table[position / b->page_size] * b->page_stride + t->kv_head * b->head_stride + offset * b->dim;
        for (; j < at->to && offset < b->page_size; j++, offset++, key += b->dim) at->key[j] = key, at->value[j] = key + b->kv_stride;
        for (int i = run; i < j; i++) at->all[n++] = at->key[i];
        for (int i = run; i < j; i++) at->all[n++] = at->value[i];
    }
}

/* The state of one block alone. Pages lie anywhere in memory, so the hardware does not see what comes next: `next` is fetched
 * meanwhile, its keys while keys are read and its values while values are. */
static void attend_block(const Batch *b, const Tile *t, int64_t block, const Block *now, const Block *next, Scratch *s, State *state) {
    int64_t first = block * BLOCK, dim = b->dim;
    const float *const *key = now->key;
    int from = now->from, to = now->to;
    for (int j = 0; j < to; j += VL) {
        int64_t d = 0;
        for (int i = j; i < j + VL; i++) fetch(next->all[i], dim);
        for (; d + VL <= dim; d += VL) transpose(key + j, d, s->keys + d * BLOCK + j);
        for (; d < dim; d++)
            for (int i = 0; i < VL; i++) s->keys[d * BLOCK + j + i] = key[j + i][d];
    }
    int rows = (int)(t->count * t->group);
    for (int r = 0; r < rows; r += TALL) {
        int height = rows - r < TALL ? rows - r : TALL;
        for (int c = 0; c < to; c += WIDE(height) * VL)
            WITH_CONSTANT(R, height, TALL, scores(R, WIDE(R), s->q + r * dim, s->keys + c, s->p + r * BLOCK + c, dim))
    }
    for (int r = 0; r < rows; r++) {
        int64_t position = t->position + r / t->group - first; /* in the block */
        int64_t low = b->window ? position - b->window + 1 : 0;
        softmax(s->p + r * BLOCK, (int)(low > from ? (low < BLOCK ? low : BLOCK) : from), (int)(position + 1 < to ? (position < 0 ? 0 : position + 1) : to),
                state->m + r, state->l + r);
    }
    for (int r = 0; r < rows; r += TALL) {
        int height = rows - r < TALL ? rows - r : TALL;
        const float *p = s->p + r * BLOCK;
        float *o = state->o + r * dim;
        int64_t d = 0;
        for (; d + WIDE(height) * VL <= dim; d += WIDE(height) * VL) WITH_CONSTANT(R, height, TALL, weighted(R, WIDE(R), p, now, next, d, o, dim))
        for (; d + VL <= dim; d += VL) WITH_CONSTANT(R, height, TALL, weighted(R, 1, p, now, next, d, o, dim))
        if (d < dim) WITH_CONSTANT(R, height, TALL, weighted(R, 1, p, now, next, dim - VL, o, dim)) /* overlaps; the same sums again */
    }
}

/* Folds one row's block (mb, lb, ob) into (m, l, o). */
static __attribute__((noinline)) void fold(float *m, float *l, float *o, float mb, float lb, const float *ob, int64_t dim) {
    if (mb == -INFINITY) return;
    float top = *m > mb ? *m : mb;
    vf powers = splat(0);
    powers[0] = *m - top, powers[1] = mb - top;
    powers = exp2_(powers);
    vf keep = splat(powers[0]), add = splat(powers[1]);
    *m = top;
    *l = *l * keep[0] + lb * add[0];
    int64_t d = 0;
    for (; d + VL <= dim; d += VL) store(o + d, load(o + d) * keep + load(ob + d) * add);
    for (; d < dim; d++) o[d] = o[d] * keep[0] + ob[d] * add[0];
}

static void begin(const Batch *b, const Tile *t, State *state) {
    int rows = (int)(t->count * t->group);
    for (int r = 0; r < rows; r++) state->m[r] = -INFINITY, state->l[r] = 0;
    memset(state->o, 0, rows * b->dim * sizeof(float));
}

static void load_queries(const Batch *b, const Tile *t, float *q) {
    const float scale = b->scale * 1.44269504f; /* weights are powers of two */
    for (int64_t i = 0; i < t->count; i++) {
        const float *in = b->q + ((t->token + i) * b->heads + t->head) * b->dim;
        for (int64_t j = 0; j < t->group * b->dim; j++) *q++ = in[j] * scale;
    }
}

static void finish(const Batch *b, const Tile *t, const State *state) {
    for (int64_t i = 0, r = 0; i < t->count; i++)
        for (int64_t g = 0; g < t->group; g++, r++) {
            float *out = b->out + ((t->token + i) * b->heads + t->head + g) * b->dim, share = t->end > t->begin ? 1.0f / state->l[r] : 0.0f;
            for (int64_t d = 0; d < b->dim; d++) out[d] = state->o[r * b->dim + d] * share;
        }
}

/* The tiles of row r: its queries by ROWS / group for each KV head. Where `tiles` is NULL they are only counted. */
static int64_t cut(const Batch *b, int64_t r, Tile *tiles) {
    int64_t group = b->heads / b->kv_heads, queries = b->row_starts[r + 1] - b->row_starts[r], height = ROWS / group, n = 0;
    for (int64_t i = queries > 0 ? (queries - 1) / height * height : -1; i >= 0; i -= height) /* the longest first */
        for (int64_t h = 0; h < b->kv_heads; h++, n++) {
            if (!tiles) continue;
            int64_t count = queries - i < height ? queries - i : height, position = b->kv_lens[r] - queries + i;
            int64_t low = b->window && position - b->window + 1 > 0 ? position - b->window + 1 : 0;
            tiles[n] = (Tile){b->row_starts[r] + i, h, h * group, group, count, position, low, position + count, b->tables + r * b->table_width};
        }
    return n;
}

static int64_t blocks_of(const Tile *t) { return t->end > t->begin ? (t->end - 1) / BLOCK - t->begin / BLOCK + 1 : 0; }

/* Tiles one by one, each by one thread; a thread takes `chunk` at a time, so that it knows what comes next. */
static void by_tile(const Batch *b, const Tile *tiles, int64_t count, int64_t chunk, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch;
        State all, one;
        Block place[2]; /* of this block, and of the next */
        int at = 0;
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < count; first += chunk) {
            int64_t last = first + chunk < count ? first + chunk : count;
            for (const Tile *t = tiles + first; t < tiles + last; t++) {
                int64_t block = t->begin / BLOCK, end = block + blocks_of(t);
                if (t == tiles + first || !blocks_of(t - 1)) locate(b, t, block, place + at);
                load_queries(b, t, scratch.q);
                begin(b, t, &all);
                for (; block < end; block++, at = !at) {
                    int more = block + 1 < end;
                    const Tile *then = more || t + 1 == tiles + last ? t : t + 1;
                    locate(b, then, more ? block + 1 : then->begin / BLOCK, place + !at);
                    attend_block(b, t, block, place + at, place + !at, &scratch, &one);
                    for (int64_t r = 0; r < t->count * t->group; r++)
                        fold(all.m + r, all.l + r, all.o + r * b->dim, one.m[r], one.l[r], one.o + r * b->dim, b->dim);
                }
                finish(b, t, &all);
            }
        }
    }
}

/* Blocks in parallel, their states kept in `kept` until the tiles are folded. starts[i]: blocks before tile i; height: rows of the tallest. */
static void by_block(const Batch *b, const Tile *tiles, const int64_t *starts, int64_t count, int64_t height, float *kept, int threads) {
    int64_t stride = height * (b->dim + 2);
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch;
        State state;
        Block place;
        int64_t loaded = -1, i = 0;
#pragma omp for schedule(static)
        for (int64_t k = 0; k < starts[count]; k++) {
            while (k >= starts[i + 1]) i++;
            const Tile *t = tiles + i;
            int64_t rows = t->count * t->group;
            if (loaded != i) load_queries(b, t, scratch.q), loaded = i;
            locate(b, t, t->begin / BLOCK + k - starts[i], &place);
            attend_block(b, t, t->begin / BLOCK + k - starts[i], &place, &place, &scratch, &state);
            float *to = kept + k * stride;
            memcpy(to, state.m, rows * sizeof(float));
            memcpy(to + height, state.l, rows * sizeof(float));
            memcpy(to + 2 * height, state.o, rows * b->dim * sizeof(float));
        }
#pragma omp for schedule(static)
        for (int64_t j = 0; j < count; j++) {
            begin(b, tiles + j, &state);
            for (int64_t k = starts[j]; k < starts[j + 1]; k++) {
                const float *from = kept + k * stride;
                for (int64_t r = 0; r < tiles[j].count * tiles[j].group; r++)
                    fold(state.m + r, state.l + r, state.o + r * b->dim, from[r], from[height + r], from + 2 * height + r * b->dim, b->dim);
            }
            finish(b, tiles + j, &state);
        }
    }
}

/* q, out [tokens, heads, dim]; pages as in quire_rope_and_write_kv; tables [rows, table_width]; window 0: none.
 * heads / kv_heads <= ROWS, VL <= dim <= MAX_DIM. Returns -1 where memory runs out. */
int quire_attention(const float *q, float *out, const float *pages, const int32_t *row_starts, const int32_t *kv_lens, const int32_t *tables,
                    int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page_size, int64_t page_stride, int64_t head_stride,
                    int64_t kv_stride, int64_t table_width, int64_t window, float scale, int threads) {
    Batch b = {q, pages, out, row_starts, kv_lens, tables, rows, heads, kv_heads, dim, page_size, page_stride, head_stride, kv_stride, table_width, window, scale};
    int64_t count = 0, blocks = 0, height = 0;
    for (int64_t r = 0; r < rows; r++) count += cut(&b, r, NULL);
    Tile *tiles = malloc(count * sizeof(Tile) + (count + 1) * sizeof(int64_t));
    if (!tiles) return -1;
    int64_t *starts = (int64_t *)(tiles + count);
    for (int64_t r = 0, n = 0; r < rows; r++) n += cut(&b, r, tiles + n);
    for (int64_t i = 0; i < count; i++) {
        starts[i] = blocks, blocks += blocks_of(tiles + i);
        if (tiles[i].count * tiles[i].group > height) height = tiles[i].count * tiles[i].group;
    }
    starts[count] = blocks;
    float *kept = NULL;
    if (threads > 1 && count < 8 * threads && blocks > 1) kept = malloc(blocks * height * (dim + 2) * sizeof(float));
    if (kept)
        by_block(&b, tiles, starts, count, height, kept, threads);
    else
        by_tile(&b, tiles, count, count / (16 * threads) > 1 ? count / (16 * threads) : 1, threads);
    free(kept);
    free(tiles);
    return 0;
}
