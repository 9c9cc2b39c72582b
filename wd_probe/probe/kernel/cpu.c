/* The probe's passes over float32 weights: remembering them, whole or by their signs, and counting
   what a step did to them while putting what stands in the place of what was remembered. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* Sums in float32 go over a RUN of weights, sixteen in each lane, so that they are right to 1e-6 in
   every case; longer ones are added up in float64. */
enum { CHUNK = 1024, LANES = 8, RUN = 16 * LANES, AHEAD = 2048, WORD = 32, FIELDS = 9 };
enum { PENALIZED, OPPOSING, FLIPPED, NONFINITE, OPPOSING_SIZE, SIZE, XX, XD, DD };

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef float half_floats __attribute__((vector_size(2 * LANES)));
typedef double halves __attribute__((vector_size(4 * LANES)));

static const uint32_t MAGNITUDE = 0x7fffffff, INFINITE = 0x7f800000;
/* Products of two numbers from LEAST on do not underflow. Two floats from COARSE on are none or LEAST
   apart, as they have 24 bits. */
static const uint32_t LEAST = 0x21800000 /* 2^-60 */, COARSE = 0x2d800000 /* 2^-36 */;

static inline floats load(const float *from)
{
    floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* The sign bits of numbers, the first one's lowest. */
static inline unsigned signs_of(bits v)
{
#ifdef __AVX2__
    return (unsigned)_mm256_movemask_ps((__m256)v);
#else
    unsigned found = 0;
    for (int k = 0; k < LANES; k++)
        found |= (v[k] >> 31) << k;
    return found;
#endif
}

static inline bits lesser(bits a, bits b)
{
#ifdef __AVX2__
    return (bits)_mm256_min_epu32((__m256i)a, (__m256i)b);
#else
    for (int k = 0; k < LANES; k++)
        a[k] = a[k] < b[k] ? a[k] : b[k];
    return a;
#endif
}

static inline bits larger(bits a, bits b)
{
#ifdef __AVX2__
    return (bits)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
    for (int k = 0; k < LANES; k++)
        a[k] = a[k] > b[k] ? a[k] : b[k];
    return a;
#endif
}

/* The lanes' sums in float64. */
typedef struct {
    halves low, high;
} doubles;

static inline void add(doubles *sums, floats v)
{
    half_floats low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, (const char *)&v + sizeof low, sizeof high);
    sums->low += __builtin_convertvector(low, halves);
    sums->high += __builtin_convertvector(high, halves);
}

static inline double total(const doubles *sums)
{
    const halves v = sums->low + sums->high;
    double found = 0;
    for (int k = 0; k < LANES / 2; k++)
        found += v[k];
    return found;
}

/* --- remembering ------------------------------------------------------------------------------ */

/* Streaming stores: the copy is not read again before the step has emptied the caches, and
   writing it through them would first read what it overwrites. */
static void copy_block(const float *from, float *to, int64_t n)
{
#ifdef __AVX2__
    int64_t i = 0;
    for (; i < n && ((uintptr_t)(to + i) & 31); i++)
        to[i] = from[i];
    for (; i + 8 <= n; i += 8)
        _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
    for (; i < n; i++)
        to[i] = from[i];
    _mm_sfence();
#else
    memcpy(to, from, (size_t)n * sizeof(float));
#endif
}

void wd_probe_copy(int64_t blocks, float *const *to, const float *const *from, const int64_t *sizes,
                   int threads)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++)
        copy_block(from[k], to[k], sizes[k]);
}

/* --- whether what is remembered still stands ---------------------------------------------------- */

/* A sample of every block: PIECE neighbours of each STRETCH, at another place in each. */
enum { PIECE = 16, STRETCH = 32768, LITTLE = 256 };

static inline uint32_t mixed(uint32_t x)
{
    x = (x ^ (x >> 16)) * 0x7feb352dU;
    x = (x ^ (x >> 15)) * 0x846ca68bU;
    return x ^ (x >> 16);
}

static int differs(const float *kept, const float *now, int64_t size, uint32_t turn)
{
    const int64_t stretch = size < 4 * STRETCH ? size / 4 : STRETCH;
    if (size <= LITTLE)
        return memcmp(kept, now, (size_t)size * sizeof(float)) != 0;
    for (int64_t start = 0; start + stretch <= size; start += stretch) {
        turn = mixed(turn + (uint32_t)start);
        const uint32_t within = stretch < STRETCH ? turn % (uint32_t)(stretch - PIECE + 1)
                                                  : turn % STRETCH / PIECE * PIECE; /* a line */
        const int64_t at = start + within;
        if (memcmp(kept + at, now + at, PIECE * sizeof(float)))
            return 1;
    }
    return 0;
}

void wd_probe_differs(int64_t blocks, const float *const *kept, const float *const *now,
                      const int64_t *sizes, int threads, const uint32_t *turns, uint8_t *out)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++)
        out[k] = (uint8_t)differs(kept[k], now[k], sizes[k], turns[k]);
}

/* --- counting ----------------------------------------------------------------------------------- */

/* What a step that took c * x off did to n weights, whatever their size. */
static void count_any(const float *a, const float *b, int n, double c, int after, double *out)
{
    int penalized = 0, opposing = 0, flipped = 0, finite = 0;
    double opposing_size = 0, size = 0, xx = 0, xd = 0, dd = 0;
#pragma omp simd reduction(+ : penalized, opposing, flipped, finite) \
    reduction(+ : opposing_size, size, xx, xd, dd)
    for (int i = 0; i < n; i++) {
        const int is_finite = (fabsf(a[i]) < INFINITY) & (fabsf(b[i]) < INFINITY);
        const double x = is_finite ? a[i] : 0.0f, y = is_finite ? b[i] : 0.0f;
        const double d = y - x, old = fabs(x), new = fabs(y), weight = after ? new : old;
        const int across = ((x < 0) & (y > 0)) | ((x > 0) & (y < 0));
        const int opposes = across & (new > c / 2 * old);
        finite += is_finite;
        penalized += weight != 0;
        opposing += opposes;
        flipped += across & (new > c * old);
        opposing_size += opposes ? weight : 0.0;
        size += weight;
        xx += x * x;
        xd += x * d;
        dd += d * d;
    }
    out[PENALIZED] += penalized;
    out[OPPOSING] += opposing;
    out[FLIPPED] += flipped;
    out[NONFINITE] += n - finite;
    out[OPPOSING_SIZE] += opposing_size;
    out[SIZE] += size;
    out[XX] += xx;
    out[XD] += xd;
    out[DD] += dd;
}

/* What count_chunk adds up. */
typedef struct {
    doubles size, xx, xd, dd;
    ints zeros;
    bits least;
    double opposing_size;
    int opposing, flipped;
} counts;

/* Adds n weights, a multiple of LANES and RUN at the most; may_be_zero costs some time. */
static inline __attribute__((always_inline)) void
count_run(const float *a, const float *b, int n, double c, int after, int may_be_zero, counts *sums)
{
    floats size = {0}, xx = {0}, xd = {0}, dd = {0};
    bits least = sums->least;
    for (int i = 0; i < n; i += LANES) {
        __builtin_prefetch(a + i + AHEAD, 1); /* beyond the end it does nothing */
        __builtin_prefetch(b + i + AHEAD);
        const floats x = load(a + i), y = load(b + i), d = y - x;
        const bits ax = (bits)x & MAGNITUDE, ay = (bits)y & MAGNITUDE, ad = (bits)d & MAGNITUDE;
        const bits weighed = after ? ay : ax;
        if (may_be_zero) {
            least = lesser(least, lesser(ax - 1, ad - 1)); /* zeros wrap around */
            sums->zeros += weighed == 0;
        } else
            least = lesser(least, lesser(ax, ay));
        size += (floats)weighed;
        xx += x * x;
        xd += x * d;
        dd += d * d;
        for (unsigned across = signs_of((bits)x ^ (bits)y); across; across &= across - 1) {
            const int k = i + __builtin_ctz(across);
            const double old = fabs((double)a[k]), new = fabs((double)b[k]);
            const int opposes = old != 0 && new > c / 2 * old;
            sums->opposing += opposes;
            sums->flipped += opposes && new > c * old;
            sums->opposing_size += opposes ? (after ? new : old) : 0;
        }
    }
    sums->least = least;
    add(&sums->size, size);
    add(&sums->xx, xx);
    add(&sums->xd, xd);
    add(&sums->dd, dd);
}

/* The same of n weights, a multiple of LANES; 0, and nothing is added, where one of them is zero and
   may not be, or float32 does not do for one. */
static inline __attribute__((always_inline)) int count_chunk(const float *a, const float *b, int n,
                                                             double c, int after, int may_be_zero,
                                                             double *out)
{
    counts sums = {.least = ~(bits){0}};
    int start = 0;
    for (; start + RUN <= n; start += RUN)
        count_run(a + start, b + start, RUN, c, after, may_be_zero, &sums);
    count_run(a + start, b + start, n - start, c, after, may_be_zero, &sums);
    int32_t penalized = n;
    for (int k = 0; k < LANES; k++) {
        if (sums.least[k] < (may_be_zero ? LEAST - 1 : COARSE))
            return 0;
        penalized += sums.zeros[k];
    }
    const double xx = total(&sums.xx), dd = total(&sums.dd);
    if (!isfinite(xx + dd))
        return 0;
    out[PENALIZED] += penalized;
    out[OPPOSING] += sums.opposing;
    out[FLIPPED] += sums.flipped;
    out[OPPOSING_SIZE] += sums.opposing_size;
    out[SIZE] += total(&sums.size);
    out[XX] += xx;
    out[XD] += total(&sums.xd);
    out[DD] += dd;
    return 1;
}

static inline __attribute__((always_inline)) void
pass_block(float *kept, const float *now, int64_t size, double c, int after, double *out)
{
    int may_be_zero = 0; /* after the first chunk in which one is */
    for (int64_t start = 0; start < size; start += CHUNK, kept += CHUNK, now += CHUNK) {
        const int n = (int)(size - start < CHUNK ? size - start : CHUNK);
        const int even = n - n % LANES;
        if (may_be_zero || !count_chunk(kept, now, even, c, after, 0, out)) {
            may_be_zero = 1;
            if (!count_chunk(kept, now, even, c, after, 1, out))
                count_any(kept, now, even, c, after, out);
        }
        count_any(kept + even, now + even, n - even, c, after, out);
        memcpy(kept, now, (size_t)n * sizeof(float));
    }
}

/* For each block of weights kept from before a step and standing now, after it has taken c * x off
   (or, where after is set, a share of what stands), adds to its row of out the FIELDS sums, and
   keeps what stands. */
void wd_probe_tally(int64_t blocks, float *const *kept, const float *const *now,
                   const int64_t *sizes, int threads, const double *c, const uint8_t *after,
                   double *out)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++) {
        if (after[k])
            pass_block(kept[k], now[k], sizes[k], c[k], 1, out + FIELDS * k);
        else
            pass_block(kept[k], now[k], sizes[k], c[k], 0, out + FIELDS * k);
    }
}

/* --- the same by signs alone ------------------------------------------------------------------- */

/* One bit of a word for each of up to 32 weights: whether it is negative, and whether it is 0. */
typedef struct {
    uint32_t negative, zero;
} word;

static inline word word_of(const float *now, int n)
{
    word found = {0};
    if (n == WORD) {
        for (int i = 0; i < WORD; i += LANES) {
            const bits y = (bits)load(now + i);
            found.negative |= signs_of(y) << i;
            found.zero |= signs_of((bits)((y & MAGNITUDE) == 0)) << i;
        }
        return found;
    }
    for (int i = 0; i < n; i++) {
        found.negative |= (uint32_t)(signbit(now[i]) != 0) << i;
        found.zero |= (uint32_t)(now[i] == 0) << i;
    }
    return found;
}

/* Remembers the signs of each block, and which are 0 where there is room for that; adds to out how
   many are. */
void wd_probe_signs(int64_t blocks, uint32_t *const *kept, const float *const *now,
                    const int64_t *sizes, int threads, uint32_t *const *zeros, double *out)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++) {
        int64_t count = 0;
        for (int64_t i = 0; i < sizes[k]; i += WORD) {
            const word found = word_of(now[k] + i, sizes[k] - i < WORD ? (int)(sizes[k] - i) : WORD);
            kept[k][i / WORD] = found.negative;
            if (zeros[k])
                zeros[k][i / WORD] = found.zero;
            count += __builtin_popcount(found.zero);
        }
        out[k] += (double)count;
    }
}

static uint32_t not_finite(const float *now, int n)
{
    uint32_t found = 0;
    for (int i = 0; i < n; i++)
        found |= (uint32_t)!isfinite(now[i]) << i;
    return found;
}

/* Counts n weights in whole words, but for a last one; zeros may be null. */
static inline __attribute__((always_inline)) void
pass_words(uint32_t *kept, uint32_t *zeros, const float *now, int64_t n, int64_t *out)
{
    for (int64_t i = 0; i < n; i += WORD, now += WORD, kept++) {
        const int size = n - i < WORD ? (int)(n - i) : WORD;
        const word found = word_of(now, size);
        uint32_t across = (found.negative ^ *kept) & ~found.zero, was_zero = 0, bad = 0;
        if (size == WORD) {
            bits most = {0};
            for (int j = 0; j < WORD; j += LANES)
                most = larger(most, (bits)load(now + j) & MAGNITUDE);
            if (signs_of((bits)(most >= INFINITE)))
                bad = not_finite(now, WORD);
        } else
            bad = not_finite(now, size);
        *kept = found.negative;
        if (zeros) {
            was_zero = *zeros;
            *zeros++ = found.zero;
        }
        across &= ~(was_zero | bad);
        out[0] += size - __builtin_popcount(was_zero | bad);
        out[1] += __builtin_popcount(across);
        out[2] += __builtin_popcount(bad);
        out[3] += __builtin_popcount(found.zero);
    }
}

/* For each block counts against the signs that are kept, and keeps those that stand: adds to its
   row of out penalized, opposing and flipped (which are alike), nonfinite, and, in the place of the
   size, how many are 0. */
void wd_probe_tally_signs(int64_t blocks, uint32_t *const *kept, const float *const *now,
                         const int64_t *sizes, int threads, uint32_t *const *zeros, double *out)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++) {
        int64_t found[4] = {0};
        if (zeros[k])
            pass_words(kept[k], zeros[k], now[k], sizes[k], found);
        else
            pass_words(kept[k], 0, now[k], sizes[k], found);
        out[FIELDS * k + PENALIZED] += (double)found[0];
        out[FIELDS * k + OPPOSING] += (double)found[1];
        out[FIELDS * k + FLIPPED] += (double)found[1];
        out[FIELDS * k + NONFINITE] += (double)found[2];
        out[FIELDS * k + SIZE] += (double)found[3];
    }
}

/* A word of every stretch, as above. */
void wd_probe_differs_signs(int64_t blocks, const uint32_t *const *kept, const float *const *now,
                            const int64_t *sizes, int threads, const uint32_t *turns, uint8_t *out)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++) {
        const int64_t words = (sizes[k] + WORD - 1) / WORD;
        const int64_t stretch = words < 4 * STRETCH / WORD ? (words + 3) / 4 : STRETCH / WORD;
        uint32_t turn = turns[k];
        out[k] = 0;
        for (int64_t start = 0; start < words; start += stretch) {
            turn = mixed(turn + (uint32_t)start);
            int64_t at = start + turn % (uint64_t)stretch;
            at = at < words ? at : words - 1;
            const int64_t left = sizes[k] - at * WORD;
            const word found = word_of(now[k] + at * WORD, left < WORD ? (int)left : WORD);
            out[k] |= kept[k][at] != found.negative;
        }
    }
}
