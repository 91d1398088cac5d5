/* The loops of cpu.c over a block and over a group of rows, for REAL = float and REAL = double.
 *
 * A block is x[k * step + w] for step k and lane w. Sums over a block are REAL, sums over blocks
 * double, so that a row has as many rounding errors as a block has steps.
 */

#define LOW_REAL ((REAL)-INFINITY)
#define EXP NAME(exp)
#define LOG NAME(log)
#define ONLY NAME(only)
#define FOR_BLOCKS(k)                                                                              \
    for (int64_t k = group->begin; find_block(job, group, k, &block); k = end_of(job, &block))

/* ---- Reading and writing blocks ------------------------------------------------------------ */

#define READ_AS(TYPE, REAL_OF)                                                                     \
    {                                                                                              \
        const TYPE *from = (const TYPE *)job->data[x] + start;                                     \
        if (is_adjacent(job, group, x))                                                            \
            for (int k = 0; k < block->steps; k++)                                                 \
                for (int w = 0; w < block->lanes; w++)                                             \
                    copy[k * LANES + w] = (REAL)REAL_OF(from[group->at[x][0] + k * step + w]);     \
        else                                                                                       \
            for (int w = 0; w < block->lanes; w++)                                                 \
                for (int k = 0; k < block->steps; k++)                                             \
                    copy[k * LANES + w] = (REAL)REAL_OF(from[lane_at(job, group, x, w) + k * step]);                   \
        break;                                                                                     \
    }

/* Copies a block of tensor x to `copy`, with `fill` in lanes that it does not have. */
CLONES static void NAME(copy_block)(
    const Job *job, const Group *group, const Block *block, Tensor x, REAL fill, REAL *copy)
{
    int64_t start = start_of(job, block, x), step = step_of(job, x);
    if (block->lanes < LANES)
        for (int k = 0; k < block->steps; k++)
            for (int w = block->lanes; w < LANES; w++)
                copy[k * LANES + w] = fill;
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
    }
}

INLINE bool NAME(in_place)(const Job *job, const Group *group, const Block *block, Tensor x)
{
    return is_adjacent(job, group, x) && job->kind[x] == OWN_KIND && block->lanes == LANES;
}

/* A block of tensor x: where it is if that can be, otherwise a copy. */
INLINE const REAL *NAME(read)(
    const Job *job, const Group *group, const Block *block, Tensor x, REAL fill, REAL *copy,
    int64_t *step)
{
    if (NAME(in_place)(job, group, block, x)) {
        *step = step_of(job, x);
        return (const REAL *)job->data[x] + start_of(job, block, x) + group->at[x][0];
    }
    *step = LANES;
    NAME(copy_block)(job, group, block, x, fill, copy);
    return copy;
}

#define WRITE_AS(TYPE, TYPE_OF)                                                                    \
    {                                                                                              \
        TYPE *to = (TYPE *)job->data[x] + start;                                                   \
        if (is_adjacent(job, group, x))                                                            \
            for (int k = 0; k < block->steps; k++)                                                 \
                for (int w = 0; w < block->lanes; w++)                                             \
                    to[group->at[x][0] + k * step + w] = (TYPE)TYPE_OF(from[k * LANES + w]);       \
        else                                                                                       \
            for (int w = 0; w < block->lanes; w++)                                                 \
                for (int k = 0; k < block->steps; k++)                                             \
                    to[lane_at(job, group, x, w) + k * step] = (TYPE)TYPE_OF(from[k * LANES + w]);                     \
        break;                                                                                     \
    }

/* Writes a block that was computed in `from`. */
CLONES static void NAME(write_block)(
    const Job *job, const Group *group, const Block *block, Tensor x, const REAL *from)
{
    int64_t start = start_of(job, block, x), step = step_of(job, x);
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
    *step = own ? step_of(job, x) : LANES;
    return own ? (REAL *)job->data[x] + start_of(job, block, x) + group->at[x][0] : copy;
}

/* One element of predictions. */
INLINE REAL NAME(element)(const Job *job, Tensor x, int64_t at)
{
    switch (job->kind[x]) {
    case F32: return (REAL)((const float *)job->data[x])[at];
    case BF16: return (REAL)from_bf16(((const uint16_t *)job->data[x])[at]);
    case F16: return (REAL)from_f16(((const uint16_t *)job->data[x])[at]);
    default: return (REAL)((const double *)job->data[x])[at];
    }
}

/* ---- Integer labels ------------------------------------------------------------------------ */

/* What the lanes have added up so far: m and r of `contract`, or m and s. */
typedef struct {
    REAL m[LANES];
    double r[LANES];
} NAME(Sums);

/* Takes the largest of a block's logits into m, and returns what to subtract from logits. */
INLINE void NAME(raise)(
    bool spread, const REAL *z, int64_t step, int steps, NAME(Sums) *sums, REAL *shift,
    REAL *factor)
{
    REAL top[LANES];
    FOR_LANES(w) top[w] = sums->m[w];
    for (int k = 0; k < steps; k++)
        FOR_LANES(w) top[w] = z[k * step + w] > top[w] ? z[k * step + w] : top[w];
    if (spread) {
        REAL most = LOW_REAL;
        _Pragma("omp simd reduction(max : most)")
        for (int w = 0; w < LANES; w++)
            most = top[w] > most ? top[w] : most;
        FOR_LANES(w) top[w] = most;
    }
    FOR_LANES(w) shift[w] = top[w] == LOW_REAL ? 0 : top[w]; /* all minus infinity so far */
    FOR_LANES(w) factor[w] = EXP(sums->m[w] - shift[w]);
    FOR_LANES(w) sums->m[w] = top[w];
}

INLINE void NAME(add_logits)(
    bool spread, const REAL *z, int64_t step, const Block *block, NAME(Sums) *sums)
{
    REAL shift[LANES], factor[LANES], part[LANES] = {0};
    NAME(raise)(spread, z, step, block->steps, sums, shift, factor);
    for (int k = 0; k < block->steps; k++)
        FOR_LANES(w) part[w] += ONLY(k != block->label[w], EXP(z[k * step + w] - shift[w]));
    FOR_LANES(w) sums->r[w] = sums->r[w] * factor[w] + part[w];
}

INLINE void NAME(add_probabilities)(
    REAL low, REAL high, const REAL *q, int64_t step, const Block *block, NAME(Sums) *sums)
{
    REAL part[LANES] = {0};
    for (int k = 0; k < block->steps; k++)
        FOR_LANES(w) {
            REAL c = q[k * step + w] < low ? low : q[k * step + w];
            c = c > high ? high : c;
            part[w] += ONLY(k != block->label[w], c);
        }
    FOR_LANES(w) sums->r[w] += part[w];
}

/* The loss of a row from its m, r and p (clipped), e = exp(p - m), and what backward needs. */
INLINE void NAME(finish)(
    const Job *job, int64_t row, bool counted, int64_t y, REAL m, double r, REAL p, REAL e)
{
    double loss = NAN;
    if (!counted)
        loss = 0;
    else if (is_class(job, y))
        loss = job->probabilities ? log((r + p) / p) : log(r + e) + (double)(m - p);
    ((REAL *)job->loss)[row] = (REAL)loss;
    ((REAL *)job->saved)[row] = (REAL)r;
    if (!job->probabilities)
        ((REAL *)job->saved)[job->rows + row] = m;
}

INLINE REAL NAME(clip)(const Job *job, REAL q)
{
    REAL low = (REAL)job->low, high = (REAL)job->high;
    q = q < low ? low : q;
    return q > high ? high : q;
}

/* Losses, or m, r and p of a segment if `part` is given. */
INLINE void NAME(group_losses)(const Job *job, Group *group, double *part)
{
    NAME(Sums) sums;
    REAL p[LANES] = {0}, e[LANES], copy[STEPS * LANES];
    Block block;
    FOR_LANES(w) sums.m[w] = job->probabilities ? 0 : LOW_REAL;
    FOR_LANES(w) sums.r[w] = 0;
    if (!group->any_counted)
        group->end = group->begin;
    FOR_BLOCKS(k) {
        int64_t step;
        const REAL *z = NAME(read)(job, group, &block, Z, LOW_REAL, copy, &step);
        if (job->probabilities)
            NAME(add_probabilities)((REAL)job->low, (REAL)job->high, z, step, &block, &sums);
        else
            NAME(add_logits)(job->spread, z, step, &block, &sums);
        for (int w = 0; w < block.lanes; w++)
            if (block.label[w] >= 0)
                p[job->spread ? 0 : w] = z[block.label[w] * step + w];
    }
    if (job->spread)
        for (int w = 1; w < LANES; w++)
            sums.r[0] += sums.r[w];
    if (job->probabilities)
        FOR_LANES(w) p[w] = NAME(clip)(job, p[w]);
    else
        FOR_LANES(w) e[w] = EXP(p[w] - sums.m[w]);
    if (part)
        part[0] = sums.m[0], part[1] = sums.r[0], part[2] = p[0];
    else
        for (int w = 0; w < group->rows; w++)
            NAME(finish)(job, group->row[w], group->counted[w], group->y[w], sums.m[w],
                         sums.r[w], p[w], e[w]);
}

/* Merges the segments of every row, in their order. */
static void NAME(merge_segments)(const Job *job)
{
    for (int64_t n = 0; n < job->rows; n++) {
        const double *part = job->parts + 3 * n * job->segments;
        int64_t row, at[TENSORS];
        locate(job, n, &row, at);
        bool counted = !job->counted || job->counted[row];
        int64_t y = counted ? job->y[row] : -1;
        double m = part[0], r = 0;
        for (int64_t i = 1; i < job->segments; i++)
            m = part[3 * i] > m ? part[3 * i] : m;
        for (int64_t i = 0; i < job->segments; i++)
            r += part[3 * i + 1] * (job->probabilities || part[3 * i] == m ? 1 : exp(part[3 * i] - m));
        REAL p = is_class(job, y) ? (REAL)part[3 * (y / SEGMENT) + 2] : 0;
        NAME(finish)(job, row, counted, y, (REAL)m, r, p, (REAL)exp(p - m));
    }
}

INLINE void NAME(group_gradients)(const Job *job, Group *group)
{
    REAL f[LANES], shift[LANES], at_label[LANES], in[STEPS * LANES], out[STEPS * LANES];
    REAL low = (REAL)job->low, high = (REAL)job->high;
    Block block;
    for (int w = 0; w < LANES; w++) {
        bool counted = group->counted[w];
        int64_t row = group->row[counted ? w : 0];
        f[w] = shift[w] = at_label[w] = 0;
        if (!counted)
            continue;
        double g = ((const REAL *)job->g)[row * job->g_step];
        double r = ((const REAL *)job->saved)[row], p = NAN;
        if (is_class(job, group->y[w]))
            p = NAME(element)(job, Z, group->at[Z][w] + group->y[w] * job->class_step[Z]);
        if (job->probabilities) {
            double c = is_class(job, group->y[w]) ? NAME(clip)(job, (REAL)p) : NAN;
            f[w] = (REAL)(g / (r + c));
            at_label[w] = low <= p && p <= high ? (REAL)(-(g / (r + c)) * (r / c)) : 0;
        } else {
            double m = ((const REAL *)job->saved)[job->rows + row];
            double s = r + EXP((REAL)p - (REAL)m);
            shift[w] = m == LOW_REAL ? 0 : (REAL)m;
            f[w] = (REAL)(g / s);
            at_label[w] = (REAL)(-g * (r / s));
        }
    }
    if (job->spread)
        for (int w = 1; w < LANES; w++)
            f[w] = f[0], shift[w] = shift[0], at_label[w] = at_label[0];
    bool all = true;
    for (int w = 0; w < group->rows; w++)
        all &= group->counted[w];
    FOR_BLOCKS(k) {
        int64_t step = LANES, out_step;
        REAL *dz = NAME(place)(job, group, &block, DZ, out, &out_step);
        if (!group->any_counted) {
            for (int i = 0; i < block.steps; i++)
                FOR_LANES(w) dz[i * out_step + w] = 0;
        } else {
            const REAL *z = NAME(read)(job, group, &block, Z, 0, in, &step);
            if (job->probabilities)
                for (int i = 0; i < block.steps; i++)
                    FOR_LANES(w) {
                        REAL q = z[i * step + w];
                        dz[i * out_step + w] = ONLY(q >= low && q <= high, f[w]);
                    }
            else
                for (int i = 0; i < block.steps; i++)
                    FOR_LANES(w) dz[i * out_step + w] = f[w] * EXP(z[i * step + w] - shift[w]);
        }
        for (int w = 0; w < block.lanes; w++)
            if (block.label[w] >= 0)
                dz[block.label[w] * out_step + w] = at_label[w];
        if (!all)
            for (int w = 0; w < block.lanes; w++)
                if (!job->spread && !group->counted[w])
                    for (int i = 0; i < block.steps; i++)
                        dz[i * out_step + w] = 0;
        if (dz == out)
            NAME(write_block)(job, group, &block, DZ, out);
    }
}

/* ---- A target for every class --------------------------------------------------------------- */

/* Sums of a group of rows: as `targets.py` has the letters. */
typedef struct {
    NAME(Sums) exponentials; /* m and s of logits */
    double total[LANES];     /* T; a of probabilities */
    double loss[LANES];      /* sum_j t_j (m - z_j); of probabilities sum_j t_j -log c_j */
} NAME(TargetSums);

/* A block of targets, smoothed. */
INLINE const REAL *NAME(read_targets)(
    const Job *job, const Group *group, const Block *block, REAL *copy, int64_t *step)
{
    const REAL *t = NAME(read)(job, group, block, T, 0, copy, step);
    if (job->smoothing == 0)
        return t;
    REAL keep = (REAL)(1 - job->smoothing), share = (REAL)(job->smoothing / (double)job->classes);
    for (int k = 0; k < block->steps; k++)
        FOR_LANES(w) copy[k * LANES + w] = t[k * *step + w] * keep + share;
    *step = LANES;
    return copy;
}

INLINE void NAME(add_logits_and_targets)(
    bool spread, const REAL *z, int64_t step, const REAL *t, int64_t t_step, const Block *block,
    NAME(TargetSums) *sums)
{
    REAL shift[LANES], factor[LANES], s[LANES] = {0}, total[LANES] = {0}, loss[LANES] = {0};
    REAL before[LANES];
    FOR_LANES(w) before[w] = sums->exponentials.m[w];
    NAME(raise)(spread, z, step, block->steps, &sums->exponentials, shift, factor);
    for (int k = 0; k < block->steps; k++)
        FOR_LANES(w) {
            REAL x = z[k * step + w] - shift[w];
            bool here = k != block->label[w];
            s[w] += ONLY(here, EXP(x));
            total[w] += ONLY(here, t[k * t_step + w]);
            loss[w] -= ONLY(here, t[k * t_step + w] * x);
        }
    FOR_LANES(w) {
        double rise = before[w] == LOW_REAL ? 0 : (double)shift[w] - before[w];
        sums->loss[w] += sums->total[w] * rise + loss[w];
        sums->total[w] += total[w];
        sums->exponentials.r[w] = sums->exponentials.r[w] * factor[w] + s[w];
    }
}

/* Sums of probabilities without the lanes that a block does not have. */
INLINE void NAME(add_up)(const REAL *q, int64_t step, const Block *block, double *sum)
{
    REAL part[LANES] = {0};
    for (int k = 0; k < block->steps; k++)
        FOR_LANES(w) part[w] += ONLY(k != block->label[w], q[k * step + w]);
    FOR_LANES(w) sum[w] += part[w];
}

INLINE void NAME(add_normalised)(
    const Job *job, const REAL *s, const REAL *q, int64_t step, const REAL *t, int64_t t_step,
    const Block *block, NAME(TargetSums) *sums, REAL *inside)
{
    REAL a[LANES] = {0}, loss[LANES] = {0};
    for (int k = 0; k < block->steps; k++)
        FOR_LANES(w) {
            REAL n = q[k * step + w] / s[w], c = NAME(clip)(job, n), t_ = t[k * t_step + w];
            bool here = k != block->label[w];
            loss[w] -= ONLY(here, t_ * LOG(c));
            a[w] += ONLY(here, ONLY(n == c, t_ / c) * n);
            inside[w] = here && n == c ? 1 : inside[w];
        }
    FOR_LANES(w) sums->total[w] += a[w];
    FOR_LANES(w) sums->loss[w] += loss[w];
}

INLINE void NAME(group_target_losses)(const Job *job, Group *group)
{
    NAME(TargetSums) sums;
    REAL s[LANES], inside[LANES] = {0}, z_copy[STEPS * LANES], t_copy[STEPS * LANES];
    REAL *saved = job->saved;
    Block block;
    int64_t step, t_step;
    FOR_LANES(w) sums.exponentials.m[w] = LOW_REAL;
    FOR_LANES(w) sums.exponentials.r[w] = sums.total[w] = sums.loss[w] = 0;
    if (!group->any_counted)
        group->end = group->begin;
    if (job->probabilities) {
        FOR_BLOCKS(k) {
            const REAL *q = NAME(read)(job, group, &block, Z, 0, z_copy, &step);
            NAME(add_up)(q, step, &block, sums.exponentials.r);
        }
        if (job->spread)
            for (int w = 1; w < LANES; w++)
                sums.exponentials.r[0] += sums.exponentials.r[w];
        FOR_LANES(w) s[w] = (REAL)sums.exponentials.r[job->spread ? 0 : w];
    }
    FOR_BLOCKS(k) {
        const REAL *z = NAME(read)(job, group, &block, Z, LOW_REAL, z_copy, &step);
        const REAL *t = NAME(read_targets)(job, group, &block, t_copy, &t_step);
        if (job->probabilities)
            NAME(add_normalised)(job, s, z, step, t, t_step, &block, &sums, inside);
        else
            NAME(add_logits_and_targets)(job->spread, z, step, t, t_step, &block, &sums);
    }
    if (job->spread)
        for (int w = 1; w < LANES; w++) {
            sums.total[0] += sums.total[w];
            sums.loss[0] += sums.loss[w];
            inside[0] = inside[w] ? 1 : inside[0];
            if (!job->probabilities)
                sums.exponentials.r[0] += sums.exponentials.r[w];
        }
    for (int w = 0; w < group->rows; w++) {
        int64_t row = group->row[w];
        double loss = sums.loss[w];
        if (!job->probabilities)
            loss += sums.total[w] * log(sums.exponentials.r[w]);
        ((REAL *)job->loss)[row] = group->counted[w] ? (REAL)loss + 0 : 0; /* never -0.0 */
        saved[row] = (REAL)sums.exponentials.r[w];
        saved[job->rows + row] = (REAL)sums.total[w];
        saved[2 * job->rows + row] = job->probabilities ? inside[w] : sums.exponentials.m[w];
    }
}

INLINE void NAME(group_target_gradients)(const Job *job, Group *group)
{
    const REAL *saved = job->saved;
    REAL g[LANES], s[LANES], total[LANES], third[LANES], logarithm[LANES], f[LANES], keep[LANES];
    REAL z_copy[STEPS * LANES], t_copy[STEPS * LANES], dz_copy[STEPS * LANES], dt_copy[STEPS * LANES];
    Block block;
    for (int w = 0; w < LANES; w++) {
        int v = job->spread ? 0 : w;
        int64_t row = group->row[group->counted[v] ? v : 0];
        keep[w] = group->counted[v];
        g[w] = keep[w] ? ((const REAL *)job->g)[row * job->g_step] : 0;
        s[w] = saved[row], total[w] = saved[job->rows + row];
        third[w] = saved[2 * job->rows + row];
        if (job->probabilities) {
            f[w] = third[w] ? g[w] : 0; /* where all are clipped, whatever g is */
        } else {
            third[w] = third[w] == LOW_REAL ? 0 : third[w];
            logarithm[w] = (REAL)log(s[w]);
            f[w] = (REAL)((double)g[w] * total[w] / s[w]);
        }
    }
    REAL scale = (REAL)(1 - job->smoothing);
    FOR_BLOCKS(k) {
        int64_t step, t_step, dz_step, dt_step;
        REAL *dz = NAME(place)(job, group, &block, DZ, dz_copy, &dz_step);
        REAL *dt = NAME(place)(job, group, &block, DT, dt_copy, &dt_step);
        const REAL *z = z_copy, *t = t_copy;
        step = t_step = LANES;
        if (group->any_counted) {
            z = NAME(read)(job, group, &block, Z, 0, z_copy, &step);
            t = NAME(read_targets)(job, group, &block, t_copy, &t_step);
        } else {
            memset(z_copy, 0, sizeof z_copy);
            memset(t_copy, 0, sizeof t_copy);
        }
        for (int i = 0; i < block.steps; i++) {
            const REAL *x = z + i * step, *u = t + i * t_step;
            REAL *dx = dz + i * dz_step, *du = dt + i * dt_step;
            if (job->probabilities && job->data[DZ])
                FOR_LANES(w) {
                    REAL n = x[w] / s[w], c = NAME(clip)(job, n);
                    REAL slope = (total[w] - ONLY(n == c, u[w] / c)) * f[w] / s[w];
                    dx[w] = ONLY(keep[w] != 0, slope);
                }
            else if (job->data[DZ])
                FOR_LANES(w)
                    dx[w] = ONLY(keep[w] != 0, f[w] * EXP(x[w] - third[w]) - g[w] * u[w]);
            if (job->probabilities && job->data[DT])
                FOR_LANES(w)
                    du[w] = ONLY(keep[w] != 0, -scale * g[w] * LOG(NAME(clip)(job, x[w] / s[w])));
            else if (job->data[DT])
                FOR_LANES(w)
                    du[w] = ONLY(keep[w] != 0, scale * g[w] * (third[w] - x[w] + logarithm[w]));
        }
        if (job->data[DZ] && dz == dz_copy)
            NAME(write_block)(job, group, &block, DZ, dz_copy);
        if (job->data[DT] && dt == dt_copy)
            NAME(write_block)(job, group, &block, DT, dt_copy);
    }
}

/* ---- Units of work --------------------------------------------------------------------------- */

#define FOR_GROUPS(BODY)                                                                           \
    int64_t segment = unit % job->segments, width = job->spread ? 1 : LANES;                       \
    int64_t n = unit / job->segments * job->unit_groups * width;                                   \
    int64_t end = n + job->unit_groups * width;                                                    \
    Group group;                                                                                   \
    for (end = end < job->rows ? end : job->rows; n < end; n += width) {                           \
        find_group(job, n, &group);                                                                \
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
#undef READ_AS
#undef WRITE_AS
#undef FOR_BLOCKS
#undef FOR_GROUPS
