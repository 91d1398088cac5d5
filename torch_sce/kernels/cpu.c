/* The row formulas on the CPU: one read of the predictions for the losses, one read and one write
 * for the gradients. `contract.py` and `targets.py` have the formulas and the letters.
 *
 * Predictions are computed in blocks of STEPS x LANES. In each step the LANES lanes do the same,
 * so a compiler makes vector instructions of the loop over them, whatever the machine. Lanes are
 *
 *     rows            class k of LANES rows in step k: where classes are few or not contiguous
 *     parts of a row  LANES classes of one row in each step; a row's sums are merged at its end
 *     elements        of whole rows one behind another: gradients of few classes, which need no sum
 *
 * so the loops over a block (cpu_rows.h) are written once. A block is read where it is, or copied
 * to the stack if it has another dtype or its lanes are not contiguous.
 *
 * The order of the operations of a row depends on the number of classes and their stride alone:
 * the result is bitwise the same for any number of threads, and no row depends on another.
 *
 * There is no header of PyTorch here. Tensors come as addresses and strides, and work is divided
 * among PyTorch's own threads by a function whose address `set_threads` takes.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

enum {
    LANES = 64,
    ROW_STEPS = 16,  /* in a block of parts of a row, 4 KiB of float32; most terms of a REAL sum */
    STEPS = 64,      /* in a block of rows, and the most in any */
    FEW = 64,        /* classes; fewer are computed in blocks of rows even where contiguous; where
                      * there are sums, which a row in parts ends with, fewer than twice as many */
    SEGMENT = 32768, /* classes; longer rows are cut into segments, which may go to any thread */
    GRAIN = 16384,   /* predictions: the least work to hand to a thread */
    AXES = 64,
};

_Static_assert((int)FEW >= (int)LANES, "a row in parts has at least one step");

/* Instructions are chosen when the library is loaded: AVX-512, AVX2 or what every x86-64 has. */
#if !defined(__x86_64__) || !defined(__gnu_linux__) || defined(__clang__) || defined(NO_CLONES)
#define CLONES
#elif __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector) /* GCC 12 and later, clang */
#define CAN_SHUFFLE
#endif
#endif
#define INLINE static inline __attribute__((always_inline))
#define FOR_LANES(w) _Pragma("omp simd") for (int w = 0; w < LANES; w++)

typedef enum { F32, F64, BF16, F16, I64, I32, I16, I8, U8, BOOL } Kind;
static const int64_t SIZE_OF[] = {4, 8, 2, 2, 8, 4, 2, 1, 1, 1};
typedef enum { Z, T, DZ, DT, TENSORS } Tensor;

typedef struct Job {
    void (*unit)(const struct Job *, int64_t);
    _Atomic int64_t next; /* the first unit that no thread has taken */
    int64_t units, unit_groups, group_rows, segments;

    int64_t rows, classes;
    bool spread;        /* whether lanes are parts of a row */
    bool probabilities; /* not logits */
    double low, high;   /* bounds of probabilities */
    double smoothing;   /* of targets */
    bool hot;           /* whether targets are one-hot ones, of the labels */

    /* The axes of the rows, the innermost last: their sizes, their steps in y and what else has
     * one element for each row, and their steps in each tensor, in elements. */
    int axes;
    int64_t size[AXES], row_step[AXES], step[TENSORS][AXES];
    int64_t class_step[TENSORS];
    Kind kind[TENSORS];
    char *data[TENSORS]; /* NULL: not there */

    const int64_t *y;
    const uint8_t *counted; /* not 0 for rows that count; NULL: all do */
    const void *g;
    int64_t g_step;     /* 0 if all rows have the same */
    void *loss, *saved; /* (rows), behind (3, rows) of `saved` if there is a `value`; and (2, rows)
                         * or (3, rows) */
    void *value;        /* the sum of losses times `factor` over `divisor`; NULL: not there */
    double divisor;     /* of the one g of all rows, too */
    const int64_t *order; /* in which losses are added up; NULL: as they are */
    const void *factor;   /* of each row's loss in the sum, and of its g; NULL: 1 */
    double *parts;      /* m, r and p of each segment of each row, or NULL */
} Job;

/* ---- Numbers ------------------------------------------------------------------------------- */

INLINE uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
INLINE float float_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }

INLINE float from_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }

INLINE uint16_t to_bf16(float x)
{
    uint32_t b = bits_of(x);
    uint32_t rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16; /* to nearest, ties to even */
    return x != x ? 0x7fc0 : (uint16_t)rounded;
}

INLINE float from_f16(uint16_t h)
{
    uint32_t magnitude = h & 0x7fff;
    uint32_t normal = (magnitude << 13) + 0x38000000;     /* the exponents' biases differ */
    uint32_t special = (magnitude << 13) | 0x7f800000;    /* an infinity or a NaN */
    uint32_t tiny = bits_of((float)(int32_t)magnitude * 0x1p-24f);
    uint32_t b = magnitude < 0x400 ? tiny : magnitude < 0x7c00 ? normal : special;
    return float_of(b | (uint32_t)(h & 0x8000) << 16);
}

INLINE uint16_t to_f16(float x)
{
    int32_t b = (int32_t)(bits_of(x) & 0x7fffffff);
    int32_t normal = (b - 0x38000000 + 0xfff + (b >> 13 & 1)) >> 13;             /* ties to even */
    int32_t tiny = (int32_t)bits_of(float_of((uint32_t)b) + 0.5f) - 0x3f000000; /* k * 2^-24 */
    int32_t h = b < 0x38800000 ? tiny : normal;
    h = b >= 0x477ff000 ? 0x7c00 : h; /* 65520 and more */
    h = b > 0x7f800000 ? 0x7e00 : h;
    return (uint16_t)(h | (int32_t)(bits_of(x) >> 16 & 0x8000));
}

/* exp(x) for x <= 0, within 1.1 units in the last place; 0 where it would be subnormal. A NaN stays
 * one. `ROUND` moves n = round(x / log 2) and the exponent's bias to the last bits of a sum. */
INLINE float exp_float(float x)
{
    const float ROUND = 12582912.0f + 127;
    float shifted = x * 1.44269504f + ROUND;
    float n = shifted - ROUND;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* x - n log 2; the first step is exact */
    float p = 1.3814541e-3f; /* 1 + r + p r^2 has the least relative error, 3e-9 */
    p = p * r + 8.3687454e-3f;
    p = p * r + 4.1668389e-2f;
    p = p * r + 1.6666521e-1f;
    p = p * r + 4.9999994e-1f;
    p = p * (r * r) + r;
    float power = float_of(bits_of(shifted) << 23);
    return x < -87.33f ? 0 : p * power + power;
}

INLINE double exp_double(double x)
{
    const double ROUND = 6755399441055744.0 + 1023;
    double shifted = x * 1.4426950408889634 + ROUND;
    double n = shifted - ROUND;
    double r = x - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800; /* Taylor's series to r^13 / 13!, |r| < 0.35 */
    static const double factorials[] = {1, 1, 2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800,
                                        39916800, 479001600};
    for (int k = 12; k >= 2; k--)
        p = p * r + 1 / factorials[k];
    p = p * (r * r) + r;
    uint64_t bits;
    memcpy(&bits, &shifted, 8);
    bits <<= 52;
    double power;
    memcpy(&power, &bits, 8);
    return x < -708 ? 0 : p * power + power;
}

/* log(x) for normal x, within 1 unit in the last place; a NaN stays one. */
INLINE float log_float(float x)
{
    uint32_t b = bits_of(x) - 0x3f3504f3; /* sqrt(1/2) */
    float n = (float)((int32_t)b >> 23);
    float f = float_of((b & 0x007fffff) + 0x3f3504f3) - 1.0f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    float square = f * f;
    p = p * f * square - 2.12194440e-4f * n - 0.5f * square;
    float result = f + p + 0.693359375f * n;
    return x != x ? x : result;
}

/* log(x) for normal x, within 1e-12 of it: more than enough for a float, in vectors. */
INLINE double wide_log_float(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, 8);
    bits -= 0x3fe6a09e667f3bcd; /* sqrt(1/2) */
    double n = (double)((int64_t)bits >> 52);
    bits = (bits & 0x000fffffffffffff) + 0x3fe6a09e667f3bcd;
    double y;
    memcpy(&y, &bits, 8);
    double f = (y - 1) / (y + 1), square = f * f;
    double series = 1.0 / 13; /* of artanh(f), |f| < 0.172 */
    for (int k = 11; k > 0; k -= 2)
        series = series * square + 1.0 / k;
    double result = n * 0.6931471805599453 + 2 * f * series;
    return x != x ? x : x > 1.7e308 ? x : result;
}

/* x where `keep`, otherwise 0, in arithmetic that vectorises on every machine. */
INLINE float only_float(bool keep, float x) { return float_of(bits_of(x) & -(uint32_t)keep); }
INLINE double only_double(bool keep, double x)
{
    uint64_t bits;
    memcpy(&bits, &x, 8);
    bits &= -(uint64_t)keep;
    memcpy(&x, &bits, 8);
    return x;
}

/* ---- Rows and blocks ----------------------------------------------------------------------- */

/* Up to LANES rows, computed together, or one after the other if lanes are their parts. */
typedef struct {
    int rows;
    int64_t row[LANES];            /* in y */
    int64_t at[TENSORS][LANES];    /* of class 0, in elements */
    bool adjacent[TENSORS];        /* whether class 0 of the rows is contiguous */
    bool packed[TENSORS];          /* whether the rows follow each other without a gap */
    bool in_order;                 /* whether `row` counts up */
    bool flat;                     /* whether lanes are elements */
    int64_t y[LANES];              /* -1: not a class */
    bool counted[LANES], any_counted, all_counted;
    int64_t begin, end;            /* the classes, or elements, that are computed */
} Group;

/* Consecutive classes of a group or of a row, or elements. */
typedef struct {
    int64_t first;         /* the class of step 0, and lane 0 unless lanes are rows; or element */
    int steps, lanes;
    int row;               /* that is computed in parts, otherwise 0 */
    int skip;              /* lanes of a row's last step that have been computed */
    int label;             /* of a row in parts, as step * LANES + lane; -1: not in this block */
    int32_t labels[LANES]; /* of rows: the step of each lane's label, or -1 */
} Block;

INLINE void locate(const Job *job, int64_t n, int64_t *row, int64_t at[TENSORS])
{
    *row = 0;
    for (int x = 0; x < TENSORS; x++)
        at[x] = 0;
    for (int a = job->axes - 1; a >= 0; a--) {
        int64_t i = a ? n % job->size[a] : n;
        n = a ? n / job->size[a] : 0;
        *row += i * job->row_step[a];
        for (int x = 0; x < TENSORS; x++)
            at[x] += i * job->step[x][a];
    }
}

/* Below 0 if y is not in [0, classes). */
INLINE int64_t not_class(int64_t y, int64_t classes)
{
    return y | (int64_t)((uint64_t)classes - 1 - (uint64_t)y);
}

INLINE void find_group(const Job *job, int64_t n, int64_t end, Group *group)
{
    int last = job->axes - 1, rows = (int)(end - n < job->group_rows ? end - n : job->group_rows);
    int64_t row, at[TENSORS];
    bool one_run = rows <= job->size[last] - n % job->size[last];
    group->rows = rows;
    group->in_order = one_run && job->row_step[last] == 1;
    locate(job, n, &row, at); /* of the first row */
    for (int w = 0; w < rows && one_run; w++)
        group->row[w] = row + w * job->row_step[last];
    for (int w = 0; w < rows && !one_run; w++) {
        locate(job, n + w, &group->row[w], at);
        for (int x = 0; x < TENSORS; x++)
            group->at[x][w] = at[x];
    }
    for (int x = 0; x < TENSORS; x++) {
        group->adjacent[x] = job->spread || (one_run && job->step[x][last] == 1);
        group->packed[x] = one_run && job->class_step[x] == 1
            && (rows == 1 || job->step[x][last] == job->classes);
        for (int w = 0; job->data[x] && one_run && w < rows; w++)
            group->at[x][w] = at[x] + w * job->step[x][last];
    }
    group->any_counted = group->all_counted = job->counted == NULL;
    for (int w = 0; w < LANES; w++)
        group->counted[w] = w < rows, group->y[w] = -1;
    if (job->counted) {
        group->all_counted = true;
        for (int w = 0; w < rows; w++) {
            group->counted[w] = job->counted[group->row[w]] != 0;
            group->any_counted |= group->counted[w];
            group->all_counted &= group->counted[w];
        }
    }
    if (job->y && group->in_order && rows == LANES)
        memcpy(group->y, job->y + row, sizeof group->y);
    else
        for (int w = 0; w < rows && job->y; w++)
            group->y[w] = job->y[group->row[w]];
    FOR_LANES(w) { /* -1 has all bits */
        int64_t outside = not_class(group->y[w], job->classes) >> 63;
        group->y[w] |= outside | (group->counted[w] - 1);
    }
    group->flat = false;
    group->begin = 0;
    group->end = job->classes;
}

/* Makes lanes elements, if there are few classes and the rows of z and dz are packed. */
INLINE void flatten(const Job *job, Group *group)
{
    group->flat = job->classes < FEW && group->packed[Z] && group->packed[DZ];
    if (group->flat)
        group->end = group->rows * job->classes;
}

/* The next block of a group, or of row `block->row`, from class `first`; false if there is none. */
INLINE bool find_block(const Job *job, const Group *group, int64_t first, Block *block)
{
    int64_t left = group->end - first;
    if (left <= 0)
        return false;
    block->first = first;
    block->skip = 0;
    block->label = -1;
    if (group->flat) {
        block->steps = (int)(left >= STEPS * LANES ? STEPS : left >= LANES ? left / LANES : 1);
        block->lanes = (int)(left >= LANES ? LANES : left);
    } else if (job->spread) {
        int64_t steps = left < LANES ? 1 : left / LANES;
        block->steps = (int)(steps < ROW_STEPS ? steps : ROW_STEPS);
        block->lanes = LANES;
        block->skip = left < LANES ? (int)(LANES - left) : 0;
        block->first -= block->skip;
        uint64_t k = (uint64_t)(group->y[block->row] - block->first); /* -1 becomes a large one */
        if (!job->hot && k < (uint64_t)block->steps * LANES)
            block->label = (int)k;
    } else {
        block->steps = (int)(left < STEPS ? left : STEPS);
        block->lanes = group->rows;
        uint64_t labelled = job->hot ? 0 : (uint64_t)block->steps;
        FOR_LANES(w) {
            uint64_t k = (uint64_t)(group->y[w] - first);
            block->labels[w] = k < labelled ? (int32_t)k : -1;
        }
    }
    return true;
}

INLINE int64_t end_of(const Job *job, const Group *group, const Block *block)
{
    return block->first + (int64_t)block->steps * (job->spread || group->flat ? block->lanes : 1);
}

/* How far a step goes in tensor x. */
INLINE int64_t step_of(const Job *job, const Group *group, Tensor x)
{
    return job->spread || group->flat ? LANES * job->class_step[x] : job->class_step[x];
}

INLINE int64_t start_of(const Job *job, const Block *block, Tensor x)
{
    return block->first * job->class_step[x];
}

/* Whether the lanes of a step are contiguous in tensor x. */
INLINE bool is_adjacent(const Job *job, const Group *group, Tensor x)
{
    return job->spread ? job->class_step[x] == 1 : group->flat || group->adjacent[x];
}

INLINE int64_t lane_at(const Job *job, const Group *group, const Block *block, Tensor x, int w)
{
    return job->spread ? group->at[x][block->row] + w * job->class_step[x] : group->at[x][w];
}

/* What is read after a block: where step 0 of it is, and how many bytes each step goes. */
typedef struct {
    const char *start;
    int64_t step;
} Ahead;

INLINE Ahead ahead_of(const Job *job, const Group *group, const Block *block, Tensor x)
{
    int64_t size = SIZE_OF[job->kind[x]], first = group->at[x][block->row], step = LANES;
    if (job->spread)
        first += end_of(job, group, block);
    else if (group->adjacent[x] && !group->packed[x]) /* the same classes of the next rows */
        step = job->class_step[x], first += block->first * step + LANES;
    else
        first += group->rows * job->classes;
    return (Ahead){job->data[x] + first * size, step * size};
}

/* Asks for what step k of a block has of tensor x. */
INLINE void fetch(const Job *job, Tensor x, Ahead ahead, int k)
{
    for (int64_t i = 0; i < LANES * SIZE_OF[job->kind[x]]; i += 64)
        __builtin_prefetch(ahead.start + k * ahead.step + i);
}

/* ---- The loops, for both types that rows are computed in ------------------------------------ */

#define REAL float
#define OWN_KIND F32
#define NAME(x) x##_float
#include "cpu_rows.h"
#undef REAL
#undef OWN_KIND
#undef NAME

#define REAL double
#define OWN_KIND F64
#define NAME(x) x##_double
#define log_double log
#define wide_log_double log
#include "cpu_rows.h"

/* ---- Threads ------------------------------------------------------------------------------- */

typedef void (*Part)(int64_t, int64_t, void *);

static int32_t (*torch_parallel_for)(int64_t, int64_t, int64_t, Part, void *);
static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);

static void take_units(Job *job)
{
    int64_t unit;
    while ((unit = atomic_fetch_add(&job->next, 1)) < job->units)
        job->unit(job, unit);
}

static void take_part(int64_t begin, int64_t end, void *job)
{
    (void)begin, (void)end;
    take_units(job);
}

static void take_all(void *job) { take_units(job); }

/* Computes all units, each by the thread that is free first. */
static void run(Job *job, int64_t threads)
{
    bool sums = job->loss != NULL;
    job->spread = job->spread && (!sums || job->classes >= 2 * FEW);
    int64_t grain = job->spread ? GRAIN : GRAIN / 4; /* few classes take longer */
    int64_t most_rows = job->spread ? grain / job->classes : LANES;
    job->group_rows = most_rows < 1 ? 1 : most_rows < LANES ? most_rows : LANES;
    int64_t groups = (job->rows + job->group_rows - 1) / job->group_rows;
    int64_t work = job->classes * job->group_rows;
    job->unit_groups = work >= grain ? 1 : grain / work;
    job->units = (groups + job->unit_groups - 1) / job->unit_groups * job->segments;
    int64_t most = job->rows * job->classes / (2 * grain);
    threads = threads < most ? threads : most;
    threads = threads < job->units ? threads : job->units;
    if (threads > 1 && torch_parallel_for)
        torch_parallel_for(0, threads, 1, take_part, job);
    else if (threads > 1 && gomp_parallel)
        gomp_parallel(take_all, job, (unsigned)threads, 0);
    take_units(job); /* all that are left */
}

/* Asks for pages of 2 MiB for memory that is about to be written for the first time. */
static void prefer_huge_pages(void *data, int64_t bytes)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    /* From 32 MiB on an allocation is a mapping of its own, so that no other memory is affected. */
    uintptr_t page = 4096, begin = ((uintptr_t)data + page - 1) & ~(page - 1);
    uintptr_t end = ((uintptr_t)data + (uintptr_t)bytes) & ~(page - 1);
    if (bytes > 1 << 25)
        (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

/* ---- Python -------------------------------------------------------------------------------- */

/* Reads what `_plan` of cpu.py has written. */
static void read_plan(Job *job, const int64_t *plan)
{
    job->classes = *plan++;
    job->axes = (int)*plan++;
    size_t size = (size_t)job->axes * sizeof *plan;
    memcpy(job->size, plan, size);
    memcpy(job->row_step, plan += job->axes, size);
    for (int a = 0; a < job->axes; a++)
        job->rows *= job->size[a];
    plan += job->axes;
    for (int x = 0; x < TENSORS; x++) {
        job->kind[x] = (Kind)*plan++;
        job->class_step[x] = *plan++;
        memcpy(job->step[x], plan, size);
        plan += job->axes;
    }
}

static PyObject *run_python(PyObject *self, PyObject *args)
{
    static void (*const units[2][2][2])(const Job *, int64_t) = {
        {{losses_float, gradients_float}, {target_losses_float, target_gradients_float}},
        {{losses_double, gradients_double}, {target_losses_double, target_gradients_double}},
    };
    Job job = {.segments = 1, .rows = 1};
    int backward;
    long long threads, g_step;
    PyObject *clip;
    const char *plan;
    Py_ssize_t size;
    unsigned long long y, counted, g, loss, saved, value, order, factor, data[TENSORS];
    (void)self;
    if (!PyArg_ParseTuple(args, "pLy#(KKKKKKKKKKKK)LOdd:run", &backward, &threads, &plan, &size,
                          &data[Z], &data[T], &data[DZ], &data[DT], &y, &counted, &g, &loss, &saved,
                          &value, &order, &factor, &g_step, &clip, &job.smoothing, &job.divisor))
        return NULL;
    read_plan(&job, (const int64_t *)(const void *)plan);
    if (clip != Py_None) {
        job.probabilities = true;
        if (!PyArg_ParseTuple(clip, "dd", &job.low, &job.high))
            return NULL;
    }
    for (int x = 0; x < TENSORS; x++)
        job.data[x] = (char *)(uintptr_t)data[x];
    job.y = (const int64_t *)(uintptr_t)y;
    job.counted = (const uint8_t *)(uintptr_t)counted;
    job.g = (const void *)(uintptr_t)g;
    job.g_step = g_step;
    job.saved = (void *)(uintptr_t)saved;
    job.value = (void *)(uintptr_t)value;
    job.order = (const int64_t *)(uintptr_t)order;
    job.factor = (const void *)(uintptr_t)factor;
    int64_t behind = 3 * job.rows * SIZE_OF[job.kind[Z] == F64 ? F64 : F32];
    job.loss = value ? (char *)job.saved + behind : (void *)(uintptr_t)loss;

    job.hot = job.y && job.smoothing > 0;
    bool targets = job.data[T] || job.hot, wide = job.kind[Z] == F64;
    float divided_float;
    double divided_double;
    if (job.g && !job.g_step) {
        divided_float = wide ? 0 : *(const float *)job.g / (float)job.divisor;
        divided_double = wide ? *(const double *)job.g / job.divisor : 0;
        job.g = wide ? (void *)&divided_double : (void *)&divided_float;
    }
    job.spread = job.class_step[Z] == 1 && job.classes >= FEW;
    job.unit = units[wide][targets][backward];
    if (job.spread && job.classes > 2 * SEGMENT && (backward || !targets))
        job.segments = job.classes / SEGMENT; /* the last one is longer */
    if (job.segments > 1 && !backward)
        job.parts = malloc(sizeof(double) * 3 * (size_t)(job.rows * job.segments));
    if (job.segments > 1 && !backward && !job.parts)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    if (job.rows > 0 && job.classes > 0) {
        for (int x = DZ; x <= DT; x++)
            if (job.data[x])
                prefer_huge_pages(job.data[x], job.rows * job.classes * SIZE_OF[job.kind[x]]);
        run(&job, threads);
        if (job.parts)
            (wide ? merge_segments_double : merge_segments_float)(&job);
    }
    if (job.value)
        (wide ? add_losses_double : add_losses_float)(&job);
    Py_END_ALLOW_THREADS
    free(job.parts);
    return PyLong_FromLongLong(job.units);
}

/* How many labels count, of which `counted` is NULL if all do; -1 if one is not in [0, classes). */
CLONES static int64_t count_labels(
    const int64_t *y, const uint8_t *counted, int64_t n, int64_t classes)
{
    int64_t any = 0, count = counted ? 0 : n;
    if (counted)
        _Pragma("omp simd reduction(| : any) reduction(+ : count)")
        for (int64_t i = 0; i < n; i++) {
            int64_t counts = counted[i] != 0;
            count += counts;
            any |= not_class(y[i], classes) & -counts;
        }
    else
        _Pragma("omp simd reduction(| : any)")
        for (int64_t i = 0; i < n; i++)
            any |= not_class(y[i], classes);
    return any < 0 ? -1 : count;
}

static PyObject *count_labels_python(PyObject *self, PyObject *args)
{
    unsigned long long y, counted;
    long long n, classes;
    (void)self;
    if (!PyArg_ParseTuple(args, "KKLL:count_labels", &y, &counted, &n, &classes))
        return NULL;
    return PyLong_FromLongLong(count_labels(
        (const int64_t *)(uintptr_t)y, (const uint8_t *)(uintptr_t)counted, n, classes));
}

static PyObject *prefer_huge_pages_python(PyObject *self, PyObject *args)
{
    unsigned long long data;
    long long bytes;
    (void)self;
    if (!PyArg_ParseTuple(args, "KL:prefer_huge_pages", &data, &bytes))
        return NULL;
    prefer_huge_pages((void *)(uintptr_t)data, bytes);
    Py_RETURN_NONE;
}

static PyObject *set_threads(PyObject *self, PyObject *args)
{
    unsigned long long torch, gomp;
    (void)self;
    if (!PyArg_ParseTuple(args, "KK:set_threads", &torch, &gomp))
        return NULL;
    *(void **)&torch_parallel_for = (void *)(uintptr_t)torch;
    *(void **)&gomp_parallel = (void *)(uintptr_t)gomp;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"count_labels", count_labels_python, METH_VARARGS,
     "How many labels count: the addresses of labels and of bools, how many they are, and C."},
    {"prefer_huge_pages", prefer_huge_pages_python, METH_VARARGS,
     "Before memory is written for the first time: its address and how many bytes."},
    {"run", run_python, METH_VARARGS, "Losses or gradients of rows, see cpu.py; returns the number of units of work."},
    {"set_threads", set_threads, METH_VARARGS,
     "Takes the addresses of torch_parallel_for and GOMP_parallel; 0: not there."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cpu", "The loops of cpu.py.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__cpu(void)
{
    return PyModule_Create(&module);
}
