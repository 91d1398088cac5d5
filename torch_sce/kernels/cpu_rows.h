/* The loops of cpu.c over a block and over a group of rows, for REAL = float and REAL = double.
 *
 * A block is x[k * step + w] for step k and lane w. Sums over ROW_STEPS steps are REAL, sums over
 * more are double, so that a row has as many rounding errors as ROW_STEPS.
 */

#define LOW_REAL ((REAL)-INFINITY)
#define EXP NAME(exp)
#define LOG NAME(log)
#define ONLY NAME(only)
#define WIDE_LOG NAME(wide_log)
#define FOR_ROWS(w)                                                                                \
    for (int v = 0; v < rows; v += 16)                                                             \
        _Pragma("omp simd") for (int w = v; w < v + 16; w++)
#define FOR_PASSES for (block.row = 0; block.row < (job->spread ? group->rows : 1); block.row++)
#define FOR_BLOCKS(k)                                                                              \
    for (int64_t k = group->begin; find_block(job, group, k, &block); k = end_of(job, group, &block))

/* ---- Reading and writing blocks ------------------------------------------------------------ */

#ifdef CAN_SHUFFLE
typedef REAL NAME(Four) __attribute__((vector_size(4 * sizeof(REAL))));

/* Copies 4 x 4 elements to the rows of `to` from the columns of `from`. */
INLINE void NAME(transpose)(const REAL *const from[4], REAL *const to[4])
{
    NAME(Four) x[4], a, b;
    for (int i = 0; i < 4; i++)
        memcpy(&x[i], from[i], sizeof x[i]);
    a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5);
    b = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
    x[0] = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
    x[1] = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
    x[2] = __builtin_shufflevector(x[0], x[1], 0, 1, 4, 5);
    x[3] = __builtin_shufflevector(x[0], x[1], 2, 3, 6, 7);
    x[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    x[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
    for (int i = 0; i < 4; i++)
        memcpy(to[i], &x[i], sizeof x[i]);
}
#endif

/* Copies a block between the stack and rows whose classes are contiguous, four of four rows at a
 * time; false if it cannot be done so. */
INLINE bool NAME(copy_fours)(
    const Job *job, const Group *group, const Block *block, Tensor x, bool writes, REAL *copy)
{
#ifndef CAN_SHUFFLE
    (void)job, (void)group, (void)block, (void)x, (void)writes, (void)copy;
    return false;
#else
    if (job->spread || group->flat || job->class_step[x] != 1 || job->kind[x] != OWN_KIND || block->steps < 4
        || block->lanes % 4)
        return false;
    REAL *there = (REAL *)job->data[x] + block->first;
    for (int w = 0; w < block->lanes; w += 4)
        for (int k = 0; k < block->steps; k += 4) {
            int first = k + 4 <= block->steps ? k : block->steps - 4; /* some are copied twice */
            REAL *rows[4], *steps[4];
            for (int i = 0; i < 4; i++) {
                rows[i] = there + group->at[x][w + i] + first;
                steps[i] = copy + (first + i) * LANES + w;
            }
            if (writes)
                NAME(transpose)((const REAL *const *)steps, rows);
            else
                NAME(transpose)((const REAL *const *)rows, steps);
        }
    return true;
#endif
}

#define READ_AS(TYPE, REAL_OF)                                                                     \
    {                                                                                              \
        const TYPE *from = (const TYPE *)job->data[x] + start_of(job, block, x);                   \
        if (is_adjacent(job, group, x))                                                            \
            for (int k = 0; k < steps; k++)                                                        \
                for (int w = 0; w < lanes; w++)                                                    \
                    copy[k * LANES + w] =                                                          \
                        (REAL)REAL_OF(from[group->at[x][block->row] + k * step + w]);              \
        else                                                                                       \
            for (int w = 0; w < lanes; w++)                                                        \
                for (int k = 0; k < steps; k++)                                                    \
                    copy[k * LANES + w] =                                                          \
                        (REAL)REAL_OF(from[lane_at(job, group, block, x, w) + k * step]);          \
        break;                                                                                     \
    }

#define WRITE_AS(TYPE, TYPE_OF)                                                                    \
    {                                                                                              \
        TYPE *to = (TYPE *)job->data[x] + start_of(job, block, x);                                 \
        if (is_adjacent(job, group, x))                                                            \
            for (int k = 0; k < steps; k++)                                                        \
                for (int w = 0; w < lanes; w++)                                                    \
                    to[group->at[x][block->row] + k * step + w] =                                  \
                        (TYPE)TYPE_OF(copy[k * LANES + w]);                                        \
        else                                                                                       \
            for (int w = 0; w < lanes; w++)                                                        \
                for (int k = 0; k < steps; k++)                                                    \
                    to[lane_at(job, group, block, x, w) + k * step] =                              \
                        (TYPE)TYPE_OF(copy[k * LANES + w]);                                        \
        break;                                                                                     \
    }

/* Copies a block of tensor x to `copy`, with `fill` in lanes that it does not have. */
CLONES static void NAME(copy_block)(
    const Job *job, const Group *group, const Block *block, Tensor x, REAL fill, REAL *copy)
{
    int64_t step = step_of(job, group, x);
    int steps = block->steps, lanes = block->lanes;
    for (int k = 0; k < steps; k++)
        for (int w = lanes; w < LANES; w++)
            copy[k * LANES + w] = fill;
    if (NAME(copy_fours)(job, group, block, x, false, copy))
        return;
    switch (job->kind[x]) {
    case F32: READ_AS(float, )
    case F64: READ_AS(double, )
    case BF16: READ_AS(uint16_t, from_bf16)
    case F16: READ_AS(uint16_t, from_f16)
    case I64: READ_AS(int64_t, )
    case I32: READ_AS(int32_t, )
    case I16: READ_AS(int16_t, )
    case I8: READ_AS(int8_t, )
    case U8: READ_AS(uint8_t, )
    case BOOL: READ_AS(uint8_t, 0 != )
    }
}

INLINE bool NAME(in_place)(const Job *job, const Group *group, const Block *block, Tensor x)
{
    return is_adjacent(job, group, x) && job->kind[x] == OWN_KIND && block->lanes == LANES;
}

INLINE REAL *NAME(address)(const Job *job, const Group *group, const Block *block, Tensor x)
{
    return (REAL *)job->data[x] + start_of(job, block, x) + group->at[x][block->row];
}

/* A block of tensor x: where it is if that can be, otherwise a copy. */
INLINE const REAL *NAME(read)(
    const Job *job, const Group *group, const Block *block, Tensor x, REAL fill, REAL *copy,
    int64_t *step)
{
    if (NAME(in_place)(job, group, block, x)) {
        *step = step_of(job, group, x);
        return NAME(address)(job, group, block, x);
    }
    *step = LANES;
    NAME(copy_block)(job, group, block, x, fill, copy);
    return copy;
}

/* Writes a block that was computed in `copy`. */
CLONES static void NAME(write_block)(
    const Job *job, const Group *group, const Block *block, Tensor x, REAL *copy)
{
    int64_t step = step_of(job, group, x);
    int steps = block->steps, lanes = block->lanes;
    if (NAME(copy_fours)(job, group, block, x, true, copy))
        return;
    switch (job->kind[x]) {
    case F32: WRITE_AS(float, )
    case F64: WRITE_AS(double, )
    case BF16: WRITE_AS(uint16_t, to_bf16)
    case F16: WRITE_AS(uint16_t, to_f16)
    default: break; /* only a tensor of floats has a gradient */
    }
}

/* Where to compute a block of tensor x: in its place if that can be, otherwise in `copy`. */
INLINE REAL *NAME(place)(
    const Job *job, const Group *group, const Block *block, Tensor x, REAL *copy, int64_t *step)
{
    bool own = NAME(in_place)(job, group, block, x);
    *step = own ? step_of(job, group, x) : LANES;
    return own ? NAME(address)(job, group, block, x) : copy;
}

/* Keeps the last classes of a row in parts, which are computed twice, if the gradient of the first
 * time is written over them. */
INLINE bool NAME(keep_last)(const Job *job, const Group *group, int row, REAL *last)
{
    bool kept = job->spread && job->data[Z] == job->data[DZ]
        && (group->end - group->begin) % LANES && group->counted[row];
    Block block = {.row = row, .first = group->end - LANES, .steps = 1, .lanes = LANES};
    if (kept)
        NAME(copy_block)(job, group, &block, Z, 0, last);
    return kept;
}

/* ---- Sums ---------------------------------------------------------------------------------- */

/* m and r of `contract`, or m and s, of each row of a group; or of each lane, so far. */
typedef struct {
    REAL m[LANES];
    double r[LANES];
} NAME(Sums);

INLINE double NAME(total)(const double *x)
{
    double total = 0;
    _Pragma("omp simd reduction(+ : total)")
    for (int w = 0; w < LANES; w++)
        total += x[w];
    return total;
}

/* Raises m to the largest logit of a block, and r with it. `shift` is what to subtract from logits:
 * m, or 0 where all are minus infinity so far. The lanes of a row in parts have one m. */
INLINE void NAME(raise)(
    bool spread, const REAL *z, int64_t step, int steps, NAME(Sums) *sums, REAL *shift)
{
    REAL top[LANES];
    FOR_LANES(w) top[w] = sums->m[w];
    for (int k = 0; k < steps; k++)
        FOR_LANES(w) top[w] = z[k * step + w] > top[w] ? z[k * step + w] : top[w];
    if (spread) {
        REAL most = LOW_REAL, m = sums->m[0];
        _Pragma("omp simd reduction(max : most)")
        for (int w = 0; w < LANES; w++)
            most = top[w] > most ? top[w] : most;
        if (most > m) {
            if (m > LOW_REAL) {
                REAL fall = EXP(m - most);
                FOR_LANES(w) sums->r[w] *= fall;
            }
            FOR_LANES(w) sums->m[w] = most;
            m = most;
        }
        m = m == LOW_REAL ? 0 : m;
        FOR_LANES(w) shift[w] = m;
    } else {
        FOR_LANES(w) {
            shift[w] = top[w] == LOW_REAL ? 0 : top[w];
            sums->r[w] *= EXP(sums->m[w] - shift[w]);
            sums->m[w] = top[w];
        }
    }
}

/* ---- Integer labels ------------------------------------------------------------------------ */

/* Adds TERM of step k and lane w to the sums, without labels and what has been added before; p
 * becomes z of the labels. `ahead` is read later. */
#define ADD_UP(TERM)                                                                               \
    for (int k = 0; k < block->steps; k++) {                                                       \
        fetch(job, Z, ahead, k);                                                                   \
        if (!spread) {                                                                             \
            FOR_LANES(w) part[w] += ONLY(k != block->labels[w], TERM);                             \
            if (k % ROW_STEPS == ROW_STEPS - 1)                                                    \
                FOR_LANES(w) sums->r[w] += part[w], part[w] = 0;                                   \
        } else if (k == block->label / LANES || block->skip)                                       \
            FOR_LANES(w)                                                                           \
                part[w] += ONLY(w >= block->skip && k * LANES + w != block->label, TERM);          \
        else                                                                                       \
            FOR_LANES(w) part[w] += TERM;                                                          \
    }                                                                                              \
    FOR_LANES(w) sums->r[w] += part[w];                                                            \
    if (block->label >= 0)                                                                         \
        p[block->row] = z[block->label / LANES * step + block->label % LANES];                     \
    for (int w = 0; w < block->lanes && !spread; w++)                                              \
        p[w] = block->labels[w] < 0 ? p[w] : z[block->labels[w] * step + w];

INLINE void NAME(add_logits)(
    const Job *job, const REAL *z, int64_t step, const Block *block, NAME(Sums) *sums, REAL *p,
    Ahead ahead)
{
    bool spread = job->spread;
    REAL shift[LANES], part[LANES] = {0};
    NAME(raise)(spread, z, step, block->steps, sums, shift);
    ADD_UP(EXP(z[k * step + w] - shift[w]))
}

INLINE REAL NAME(clip)(const Job *job, REAL q)
{
    REAL low = (REAL)job->low, high = (REAL)job->high;
    q = q < low ? low : q;
    return q > high ? high : q;
}

INLINE void NAME(add_probabilities)(
    const Job *job, const REAL *z, int64_t step, const Block *block, NAME(Sums) *sums, REAL *p,
    Ahead ahead)
{
    bool spread = job->spread;
    REAL part[LANES] = {0};
    ADD_UP(NAME(clip)(job, z[k * step + w]))
}

/* Writes a number of each row of a group. */
INLINE void NAME(put)(bool in_order, int rows, const int64_t *row, const REAL *x, REAL *to)
{
    if (in_order && rows == LANES)
        memcpy(to + row[0], x, sizeof(REAL[LANES]));
    else
        for (int w = 0; w < rows; w++)
            to[row[w]] = x[w];
}

/* Losses from m and r of rows and p, which is z_y or a NaN: writes them, and saves all three, 0 for
 * rows that do not count. `counted` is NULL if all do. */
INLINE void NAME(finish)(
    const Job *job, bool in_order, int rows, const int64_t *row, const bool *counted,
    const NAME(Sums) *sums, const REAL *p)
{
    REAL loss[LANES], r[LANES], *saved = job->saved;
    int numbers = job->probabilities ? 2 : 3;
    if (job->probabilities)
        FOR_ROWS(w) {
            REAL c = NAME(clip)(job, p[w]);
            loss[w] = (REAL)WIDE_LOG((sums->r[w] + c) / c);
        }
    else
        FOR_ROWS(w) {
            double s = sums->r[w] + EXP(p[w] - sums->m[w]);
            loss[w] = (REAL)(WIDE_LOG(s) + (double)(sums->m[w] - p[w]));
        }
    FOR_ROWS(w) r[w] = (REAL)sums->r[w];
    NAME(put)(in_order, rows, row, loss, job->loss);
    NAME(put)(in_order, rows, row, r, saved);
    NAME(put)(in_order, rows, row, p, saved + job->rows);
    if (!job->probabilities)
        NAME(put)(in_order, rows, row, sums->m, saved + 2 * job->rows);
    for (int w = 0; w < rows && counted; w++)
        if (!counted[w]) {
            ((REAL *)job->loss)[row[w]] = 0;
            for (int i = 0; i < numbers; i++)
                saved[i * job->rows + row[w]] = 0;
        }
}

/* Losses, or m, r and p of a segment if `part` is given. */
INLINE void NAME(group_losses)(const Job *job, Group *group, double *part)
{
    NAME(Sums) sums, lanes;
    REAL p[LANES], copy[STEPS * LANES];
    Block block;
    FOR_LANES(w) p[w] = (REAL)NAN, sums.m[w] = sums.r[w] = 0;
    FOR_PASSES {
        FOR_LANES(w) lanes.m[w] = job->probabilities ? 0 : LOW_REAL, lanes.r[w] = 0;
        if (job->spread ? !group->counted[block.row] : !group->any_counted)
            continue;
        FOR_BLOCKS(k) {
            int64_t step;
            Ahead ahead = ahead_of(job, group, &block, Z);
            const REAL *z = NAME(read)(job, group, &block, Z, LOW_REAL, copy, &step);
            if (job->probabilities)
                NAME(add_probabilities)(job, z, step, &block, &lanes, p, ahead);
            else
                NAME(add_logits)(job, z, step, &block, &lanes, p, ahead);
        }
        if (job->spread)
            sums.m[block.row] = lanes.m[0], sums.r[block.row] = NAME(total)(lanes.r);
        else
            sums = lanes;
    }
    if (part)
        part[0] = sums.m[0], part[1] = sums.r[0], part[2] = p[0];
    else
        NAME(finish)(
            job, group->in_order, group->rows, group->row,
            group->all_counted ? NULL : group->counted, &sums, p);
}

/* Merges the segments of every row, in their order. */
static void NAME(merge_segments)(const Job *job)
{
    for (int64_t n = 0; n < job->rows; n++) {
        const double *part = job->parts + 3 * n * job->segments;
        int64_t row, at[TENSORS];
        locate(job, n, &row, at);
        NAME(Sums) sums = {.m = {LOW_REAL}};
        bool counted = !job->counted || job->counted[row];
        REAL p[LANES] = {(REAL)NAN};
        for (int64_t i = 0; i < job->segments; i++)
            sums.m[0] = part[3 * i] > sums.m[0] ? (REAL)part[3 * i] : sums.m[0];
        for (int64_t i = 0; i < job->segments; i++) {
            bool highest = part[3 * i] == sums.m[0]; /* so are two infinities */
            sums.r[0] += part[3 * i + 1] * (highest ? 1 : exp(part[3 * i] - sums.m[0]));
            p[0] = part[3 * i + 2] == part[3 * i + 2] ? (REAL)part[3 * i + 2] : p[0];
        }
        NAME(finish)(job, true, 1, &row, &counted, &sums, p);
    }
}

/* Writes the sum of the losses times `factor` over `divisor`: added up in doubles, and rounded as
 * one of REALs. */
CLONES static void NAME(add_losses)(const Job *job)
{
    const REAL *loss = job->loss, *factor = job->factor;
    double terms[ROW_STEPS * LANES];
    double total = 0;
    for (int64_t first = 0; first < job->rows; first += ROW_STEPS * LANES) {
        int64_t left = job->rows - first;
        int rows = left < ROW_STEPS * LANES ? (int)left : ROW_STEPS * LANES;
        for (int n = 0; n < rows; n++) {
            int64_t row = job->order ? job->order[first + n] : first + n;
            terms[n] = factor ? (double)loss[row] * factor[row] : loss[row];
        }
        double part = 0;
        _Pragma("omp simd reduction(+ : part)")
        for (int n = 0; n < rows; n++)
            part += terms[n];
        total += part;
    }
    *(REAL *)job->value = (REAL)total / (REAL)job->divisor;
}

/* Writes x[w] for every element of row w, one row behind another, and perhaps some elements more. */
INLINE void NAME(repeat)(const Job *job, const Group *group, const REAL *x, REAL *to)
{
    for (int w = 0; w < group->rows; w++)
        for (int64_t k = 0; k < job->classes; k += 8)
            for (int i = 0; i < 8; i++)
                to[w * job->classes + k + i] = x[w];
}

/* Stores x at element `at` of the gradient. */
INLINE void NAME(store)(const Job *job, Tensor dx, int64_t at, REAL x)
{
    if (job->kind[dx] == OWN_KIND)
        ((REAL *)job->data[dx])[at] = x;
    else
        ((uint16_t *)job->data[dx])[at] =
            job->kind[dx] == BF16 ? to_bf16((float)x) : to_f16((float)x);
}

/* Reads a number of each row of a group. */
INLINE void NAME(get)(const Group *group, const REAL *from, int64_t step, REAL *to)
{
    if (step == 0)
        FOR_LANES(w) to[w] = from[0];
    else if (group->in_order && group->rows == LANES)
        memcpy(to, from + group->row[0], sizeof(REAL[LANES]));
    else
        for (int w = 0; w < group->rows; w++)
            to[w] = from[group->row[w]];
}

INLINE void NAME(group_gradients)(const Job *job, Group *group)
{
    REAL f[LANES], shift[LANES], at_label[LANES], in[STEPS * LANES], out[STEPS * LANES];
    REAL f_of[LANES * FEW + 8], shift_of[LANES * FEW + 8]; /* of elements, or of a row in parts */
    REAL g[LANES], m[LANES], r[LANES], p[LANES], low = (REAL)job->low, high = (REAL)job->high;
    const REAL *saved = job->saved;
    int rows = group->rows;
    Block block;
    FOR_LANES(w) g[w] = m[w] = p[w] = 0, r[w] = 1;
    NAME(get)(group, job->g, job->g_step, g);
    if (job->factor) {
        REAL factor[LANES] = {0};
        NAME(get)(group, job->factor, 1, factor);
        FOR_LANES(w) g[w] *= factor[w];
    }
    NAME(get)(group, saved, 1, r);
    NAME(get)(group, saved + job->rows, 1, p);
    if (!job->probabilities)
        NAME(get)(group, saved + 2 * job->rows, 1, m);
    if (job->probabilities)
        FOR_ROWS(w) {
            double c = NAME(clip)(job, p[w]), s = r[w] + c;
            shift[w] = 0;
            f[w] = (REAL)(g[w] / s);
            at_label[w] = ONLY(low <= p[w] && p[w] <= high, (REAL)(-(g[w] / s) * (r[w] / c)));
        }
    else
        FOR_ROWS(w) {
            double s = (double)r[w] + EXP(p[w] - m[w]);
            shift[w] = m[w] == LOW_REAL ? 0 : m[w];
            f[w] = (REAL)(g[w] / s);
            at_label[w] = (REAL)(-g[w] * (r[w] / s));
        }
    flatten(job, group);
    if (group->flat) {
        NAME(repeat)(job, group, f, f_of);
        NAME(repeat)(job, group, shift, shift_of);
    }
    FOR_PASSES {
        REAL last[LANES];
        bool kept = NAME(keep_last)(job, group, block.row, last);
        if (job->spread)
            FOR_LANES(w) f_of[w] = f[block.row], shift_of[w] = shift[block.row];
        FOR_BLOCKS(k) {
            int64_t step = LANES, out_step, own = group->flat ? LANES : 0;
            int64_t first = group->flat ? block.first : 0;
            const REAL *fs = group->flat || job->spread ? f_of + first : f;
            const REAL *shifts = group->flat || job->spread ? shift_of + first : shift;
            REAL *dz = NAME(place)(job, group, &block, DZ, out, &out_step);
            if (job->spread ? !group->counted[block.row] : !group->any_counted) {
                for (int i = 0; i < block.steps; i++)
                    FOR_LANES(w) dz[i * out_step + w] = 0;
            } else {
                Ahead ahead = ahead_of(job, group, &block, Z);
                const REAL *z = kept && block.first + LANES == group->end
                    ? last : NAME(read)(job, group, &block, Z, 0, in, &step);
                for (int i = 0; i < block.steps && z == in; i++)
                    fetch(job, Z, ahead, i);
                if (job->probabilities)
                    for (int i = 0; i < block.steps; i++)
                        FOR_LANES(w) {
                            REAL q = z[i * step + w];
                            dz[i * out_step + w] = ONLY(q >= low && q <= high, fs[i * own + w]);
                        }
                else
                    for (int i = 0; i < block.steps; i++)
                        FOR_LANES(w)
                            dz[i * out_step + w] =
                                fs[i * own + w] * EXP(z[i * step + w] - shifts[i * own + w]);
            }
            if (block.label >= 0)
                dz[block.label / LANES * out_step + block.label % LANES] = at_label[block.row];
            for (int w = 0; w < block.lanes && !job->spread && !group->flat; w++)
                if (block.labels[w] >= 0)
                    dz[block.labels[w] * out_step + w] = at_label[w];
            if (!group->all_counted && !job->spread && !group->flat)
                for (int w = 0; w < block.lanes; w++)
                    if (!group->counted[w])
                        for (int i = 0; i < block.steps; i++)
                            dz[i * out_step + w] = 0;
            if (dz == out)
                NAME(write_block)(job, group, &block, DZ, out);
        }
    }
    for (int w = 0; w < rows && group->flat; w++) {
        if (group->y[w] >= 0)
            NAME(store)(job, DZ, group->at[DZ][w] + group->y[w], at_label[w]);
        for (int64_t k = 0; k < job->classes && !group->counted[w]; k++)
            NAME(store)(job, DZ, group->at[DZ][w] + k, 0);
    }
}

/* ---- A target for every class --------------------------------------------------------------- */

/* Sums of rows, or of lanes so far: as `targets.py` has the letters. */
typedef struct {
    NAME(Sums) exponentials; /* m and s of logits */
    double total[LANES];     /* T; a of probabilities */
    double loss[LANES];      /* sum_j t_j (m - z_j); of probabilities sum_j t_j -log c_j */
} NAME(TargetSums);

/* A block of one-hot targets, NaN in rows whose label is not a class. */
INLINE const REAL *NAME(one_hot)(
    const Job *job, const Group *group, const Block *block, REAL *copy, int64_t *step)
{
    REAL other[LANES];
    FOR_LANES(w) other[w] = group->y[job->spread ? block->row : w] < 0 ? (REAL)NAN : 0;
    for (int k = 0; k < block->steps; k++)
        FOR_LANES(w) copy[k * LANES + w] = other[w];
    for (int w = 0; w < (job->spread ? 1 : block->lanes); w++) {
        int64_t y = group->y[block->row + w], k = y - block->first;
        if (y >= 0 && 0 <= k && k < block->steps * (job->spread ? LANES : 1))
            copy[job->spread ? k : k * LANES + w] = 1;
    }
    *step = LANES;
    return copy;
}

/* A block of targets, smoothed. */
INLINE const REAL *NAME(read_targets)(
    const Job *job, const Group *group, const Block *block, REAL *copy, int64_t *step)
{
    const REAL *t = job->hot ? NAME(one_hot)(job, group, block, copy, step)
                             : NAME(read)(job, group, block, T, 0, copy, step);
    if (job->smoothing == 0)
        return t;
    REAL keep = (REAL)(1 - job->smoothing), share = (REAL)(job->smoothing / (double)job->classes);
    for (int k = 0; k < block->steps; k++)
        FOR_LANES(w) copy[k * LANES + w] = t[k * *step + w] * keep + share;
    *step = LANES;
    return copy;
}

INLINE void NAME(add_logits_and_targets)(
    const Job *job, const REAL *z, int64_t step, const REAL *t, int64_t t_step, const Block *block,
    int skip, NAME(TargetSums) *sums, Ahead z_ahead, Ahead t_ahead)
{
    REAL before[LANES], shift[LANES], s[LANES] = {0}, total[LANES] = {0}, loss[LANES] = {0};
    FOR_LANES(w) before[w] = sums->exponentials.m[w];
    NAME(raise)(job->spread, z, step, block->steps, &sums->exponentials, shift);
    FOR_LANES(w) {
        double rise = before[w] == LOW_REAL ? 0 : (double)shift[w] - before[w];
        sums->loss[w] += sums->total[w] * rise;
    }
    for (int k = 0; k < block->steps; k++) {
        fetch(job, Z, z_ahead, k);
        fetch(job, T, t_ahead, k);
        FOR_LANES(w) {
            REAL x = z[k * step + w] - shift[w];
            s[w] += ONLY(w >= skip, EXP(x));
            total[w] += ONLY(w >= skip, t[k * t_step + w]);
            loss[w] -= ONLY(w >= skip, t[k * t_step + w] * x);
        }
        if (!job->spread && k % ROW_STEPS == ROW_STEPS - 1)
            FOR_LANES(w) {
                sums->exponentials.r[w] += s[w], s[w] = 0;
                sums->total[w] += total[w], total[w] = 0;
                sums->loss[w] += loss[w], loss[w] = 0;
            }
    }
    FOR_LANES(w) {
        sums->exponentials.r[w] += s[w];
        sums->total[w] += total[w];
        sums->loss[w] += loss[w];
    }
}

INLINE void NAME(add_normalised)(
    const Job *job, const REAL *s, const REAL *q, int64_t step, const REAL *t, int64_t t_step,
    const Block *block, int skip, NAME(TargetSums) *sums, REAL *inside)
{
    REAL a[LANES] = {0}, loss[LANES] = {0};
    for (int k = 0; k < block->steps; k++) {
        FOR_LANES(w) {
            REAL n = q[k * step + w] / s[w], c = NAME(clip)(job, n), t_ = t[k * t_step + w];
            loss[w] -= ONLY(w >= skip, t_ * LOG(c));
            a[w] += ONLY(w >= skip, ONLY(n == c, t_ / c) * n);
            inside[w] = w >= skip && n == c ? 1 : inside[w];
        }
        if (!job->spread && k % ROW_STEPS == ROW_STEPS - 1)
            FOR_LANES(w) {
                sums->total[w] += a[w], a[w] = 0;
                sums->loss[w] += loss[w], loss[w] = 0;
            }
    }
    FOR_LANES(w) sums->total[w] += a[w], sums->loss[w] += loss[w];
}

INLINE void NAME(group_target_losses)(const Job *job, Group *group)
{
    NAME(TargetSums) sums = {0}, lanes;
    REAL third[LANES] = {0}, z_copy[STEPS * LANES], t_copy[STEPS * LANES], *saved = job->saved;
    Block block;
    int64_t step, t_step;
    FOR_PASSES {
        REAL s[LANES], inside[LANES] = {0};
        FOR_LANES(w) {
            lanes.exponentials.m[w] = LOW_REAL;
            lanes.exponentials.r[w] = lanes.total[w] = lanes.loss[w] = 0;
        }
        if (job->spread ? !group->counted[block.row] : !group->any_counted)
            continue;
        if (job->probabilities) {
            FOR_BLOCKS(k) {
                const REAL *q = NAME(read)(job, group, &block, Z, 0, z_copy, &step);
                REAL part[LANES] = {0};
                for (int i = 0; i < block.steps; i++) {
                    FOR_LANES(w) part[w] += ONLY(w >= block.skip, q[i * step + w]);
                    if (i % ROW_STEPS == ROW_STEPS - 1)
                        FOR_LANES(w) lanes.exponentials.r[w] += part[w], part[w] = 0;
                }
                FOR_LANES(w) lanes.exponentials.r[w] += part[w];
            }
            double whole = NAME(total)(lanes.exponentials.r);
            FOR_LANES(w) s[w] = (REAL)(job->spread ? whole : lanes.exponentials.r[w]);
        }
        FOR_BLOCKS(k) {
            Ahead z_ahead = ahead_of(job, group, &block, Z);
            Ahead t_ahead = job->hot ? z_ahead : ahead_of(job, group, &block, T);
            const REAL *z = NAME(read)(job, group, &block, Z, LOW_REAL, z_copy, &step);
            const REAL *t = NAME(read_targets)(job, group, &block, t_copy, &t_step);
            if (job->probabilities)
                NAME(add_normalised)(
                    job, s, z, step, t, t_step, &block, block.skip, &lanes, inside);
            else if (block.skip)
                NAME(add_logits_and_targets)(
                    job, z, step, t, t_step, &block, block.skip, &lanes, z_ahead, t_ahead);
            else
                NAME(add_logits_and_targets)(
                    job, z, step, t, t_step, &block, 0, &lanes, z_ahead, t_ahead);
        }
        if (job->spread) {
            int row = block.row;
            sums.exponentials.r[row] = NAME(total)(lanes.exponentials.r);
            sums.total[row] = NAME(total)(lanes.total);
            sums.loss[row] = NAME(total)(lanes.loss);
            for (int w = 1; w < LANES; w++)
                inside[0] = inside[w] != 0 ? 1 : inside[0];
            third[row] = job->probabilities ? inside[0] : lanes.exponentials.m[0];
        } else {
            sums = lanes;
            FOR_LANES(w) third[w] = job->probabilities ? inside[w] : lanes.exponentials.m[w];
        }
    }
    for (int w = 0; w < group->rows; w++) {
        int64_t row = group->row[w];
        bool counted = group->counted[w];
        double loss = sums.loss[w];
        if (!job->probabilities)
            loss += sums.total[w] * log(sums.exponentials.r[w]);
        ((REAL *)job->loss)[row] = counted ? (REAL)loss + 0 : 0; /* never -0.0 */
        saved[row] = (REAL)sums.exponentials.r[w];
        saved[job->rows + row] = (REAL)sums.total[w];
        saved[2 * job->rows + row] = third[w];
        for (int i = 0; i < 3 && !counted; i++)
            saved[i * job->rows + row] = 0;
    }
}

/* What the gradients of a row, or of a lane, are computed from. */
typedef struct {
    REAL g[LANES], s[LANES], total[LANES], third[LANES], logarithm[LANES], f[LANES], keep[LANES];
} NAME(TargetRows);

INLINE void NAME(group_target_gradients)(const Job *job, Group *group)
{
    const REAL *saved = job->saved;
    NAME(TargetRows) rows, of;
    REAL z_copy[STEPS * LANES], t_copy[STEPS * LANES], dz_copy[STEPS * LANES], dt_copy[STEPS * LANES];
    Block block;
    memset(&rows, 0, sizeof rows);
    for (int w = 0; w < group->rows; w++) {
        int64_t row = group->row[w];
        rows.keep[w] = group->counted[w];
        rows.g[w] = group->counted[w] ? ((const REAL *)job->g)[row * job->g_step] : 0;
        rows.s[w] = saved[row], rows.total[w] = saved[job->rows + row];
        rows.third[w] = saved[2 * job->rows + row];
        if (job->probabilities) {
            rows.f[w] = rows.third[w] ? rows.g[w] : 0; /* where all are clipped, whatever g is */
        } else {
            rows.third[w] = rows.third[w] == LOW_REAL ? 0 : rows.third[w];
            rows.logarithm[w] = (REAL)log(rows.s[w]);
            rows.f[w] = (REAL)((double)rows.g[w] * rows.total[w] / rows.s[w]);
        }
    }
    REAL scale = (REAL)(1 - job->smoothing), last[LANES];
    FOR_PASSES {
        bool kept = NAME(keep_last)(job, group, block.row, last);
        FOR_LANES(w) {
            int v = job->spread ? block.row : w;
            of.g[w] = rows.g[v], of.s[w] = rows.s[v], of.total[w] = rows.total[v];
            of.third[w] = rows.third[v], of.logarithm[w] = rows.logarithm[v];
            of.f[w] = rows.f[v], of.keep[w] = rows.keep[v];
        }
        FOR_BLOCKS(k) {
            int64_t step, t_step, dz_step, dt_step;
            REAL *dz = NAME(place)(job, group, &block, DZ, dz_copy, &dz_step);
            REAL *dt = NAME(place)(job, group, &block, DT, dt_copy, &dt_step);
            Ahead z_ahead = ahead_of(job, group, &block, Z);
            Ahead t_ahead = job->data[T] ? ahead_of(job, group, &block, T) : z_ahead;
            const REAL *z = z_copy, *t = t_copy;
            step = t_step = LANES;
            if (job->spread ? group->counted[block.row] : group->any_counted) {
                z = kept && block.first + LANES == group->end
                    ? last : NAME(read)(job, group, &block, Z, 0, z_copy, &step);
                t = NAME(read_targets)(job, group, &block, t_copy, &t_step);
            } else {
                memset(z_copy, 0, sizeof z_copy);
                memset(t_copy, 0, sizeof t_copy);
            }
            for (int i = 0; i < block.steps; i++) {
                const REAL *x = z + i * step, *u = t + i * t_step;
                REAL *dx = dz + i * dz_step, *du = dt + i * dt_step;
                if (z == z_copy) /* otherwise the processor itself reads ahead */
                    fetch(job, Z, z_ahead, i);
                if (t == t_copy && job->data[T])
                    fetch(job, T, t_ahead, i);
                if (job->probabilities && job->data[DZ])
                    FOR_LANES(w) {
                        REAL n = x[w] / of.s[w], c = NAME(clip)(job, n);
                        REAL slope = (of.total[w] - ONLY(n == c, u[w] / c)) * of.f[w] / of.s[w];
                        dx[w] = ONLY(of.keep[w] != 0, slope);
                    }
                else if (job->data[DZ])
                    FOR_LANES(w)
                        dx[w] = ONLY(
                            of.keep[w] != 0,
                            of.f[w] * EXP(x[w] - of.third[w]) - of.g[w] * u[w]);
                if (job->probabilities && job->data[DT])
                    FOR_LANES(w)
                        du[w] = ONLY(
                            of.keep[w] != 0,
                            -scale * of.g[w] * LOG(NAME(clip)(job, x[w] / of.s[w])));
                else if (job->data[DT])
                    FOR_LANES(w)
                        du[w] = ONLY(
                            of.keep[w] != 0,
                            scale * of.g[w] * (of.third[w] - x[w] + of.logarithm[w]));
            }
            if (job->data[DZ] && dz == dz_copy)
                NAME(write_block)(job, group, &block, DZ, dz_copy);
            if (job->data[DT] && dt == dt_copy)
                NAME(write_block)(job, group, &block, DT, dt_copy);
        }
    }
}

/* ---- Units of work --------------------------------------------------------------------------- */

#define FOR_GROUPS(BODY)                                                                           \
    int64_t segment = unit % job->segments, width = job->unit_groups * job->group_rows;            \
    int64_t n = unit / job->segments * width, end = n + width;                                     \
    Group group;                                                                                   \
    for (end = end < job->rows ? end : job->rows; n < end; n += group.rows) {                      \
        find_group(job, n, end, &group);                                                           \
        group.begin = segment * SEGMENT;                                                           \
        if (segment + 1 < job->segments)                                                           \
            group.end = group.begin + SEGMENT;                                                     \
        BODY;                                                                                      \
    }

CLONES static void NAME(losses)(const Job *job, int64_t unit)
{
    FOR_GROUPS(NAME(group_losses)(
        job, &group, job->parts ? job->parts + 3 * (n * job->segments + segment) : NULL))
}

CLONES static void NAME(gradients)(const Job *job, int64_t unit)
{
    FOR_GROUPS(NAME(group_gradients)(job, &group))
}

CLONES static void NAME(target_losses)(const Job *job, int64_t unit)
{
    FOR_GROUPS(NAME(group_target_losses)(job, &group))
}

CLONES static void NAME(target_gradients)(const Job *job, int64_t unit)
{
    FOR_GROUPS(NAME(group_target_gradients)(job, &group))
}

#undef LOW_REAL
#undef EXP
#undef LOG
#undef ONLY
#undef WIDE_LOG
#undef READ_AS
#undef WRITE_AS
#undef FOR_ROWS
#undef FOR_PASSES
#undef FOR_BLOCKS
#undef ADD_UP
#undef FOR_GROUPS
