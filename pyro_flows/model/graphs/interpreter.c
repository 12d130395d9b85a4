/* Runs elementwise operations of a recorded graph over blocks of numbers that fit the innermost cache.

   A program is a row of nests. A nest is a loop over up to DIMS dimensions; the last goes in blocks of BLOCK numbers.
   In each block, operands are found or gathered, instructions go from register to register (a block of numbers each),
   and results are stored or added up. See pyro_flows/graphs/programs.py, which writes the programs. */

#include <math.h>
#include <stdint.h>

typedef int64_t word;

enum { BLOCK = 128, DIMS = 6, WIDE = 8, PRODUCT = -1 };
enum { LOAD, STORE, STORE_AT_ONCE, ADD_UP, LARGEST, SMALLEST }; /* what is done with memory */

#define CLONED
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#if __GNUC__ >= 12
/* One version of a function for each generation of processors; the loader takes the best that this one can run. */
#undef CLONED
#define CLONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#define VECTOR(name) extern double name(double) __attribute__((simd("notinbranch"), const));
VECTOR(exp) VECTOR(log) VECTOR(sin) VECTOR(cos)
extern double pow(double, double) __attribute__((simd("notinbranch"), const));
#if __GLIBC_PREREQ(2, 35)
VECTOR(tanh) VECTOR(expm1) VECTOR(log1p) VECTOR(erf) VECTOR(erfc)
VECTOR(atan) VECTOR(tan) VECTOR(sinh) VECTOR(cosh) VECTOR(asinh)
#endif
#endif

/* One memory operand: register, number of the array, first element, strides of all dimensions, and the positions along
   one dimension, if these are given by an array of indices. */
typedef struct {
    word kind, reg, array, offset, stride[DIMS], index, along;
} Memory;

typedef struct {
    word code, single, to, a, b, c, a_step, b_step;
    double number;
} Instruction;

typedef struct {
    word words, memories, instructions, fills, size[DIMS];
} Nest;

typedef struct {
    word array, offset, count;
    double number;
} Fill;

/* A product of matrices, as many as the batch has: numbers of the arrays, first elements, strides of rows, of columns
   and from one of the batch to the next. It stands in the place of a nest, and is known by memories = PRODUCT. */
typedef struct {
    word array, offset, row, column, next;
} Matrix;

typedef struct {
    word words, memories, rows, inner, columns, batch;
    Matrix a, b, c;
} Product;

#define UNARY(code, value)                                                                                             \
    case code:                                                                                                         \
        for (word i = 0; i < n; i++) {                                                                                 \
            const double x = a[i];                                                                                     \
            to[i] = (value);                                                                                           \
        }                                                                                                              \
        break;

#define BINARY(code, value)                                                                                            \
    case code:                                                                                                         \
        if (!at->b_step) {                                                                                             \
            const double y = b[0];                                                                                     \
            for (word i = 0; i < n; i++) {                                                                             \
                const double x = a[i];                                                                                 \
                to[i] = (value);                                                                                       \
            }                                                                                                          \
        } else if (!at->a_step) {                                                                                      \
            const double x = a[0];                                                                                     \
            for (word i = 0; i < n; i++) {                                                                             \
                const double y = b[i];                                                                                 \
                to[i] = (value);                                                                                       \
            }                                                                                                          \
        } else {                                                                                                       \
            for (word i = 0; i < n; i++) {                                                                             \
                const double x = a[i], y = b[i];                                                                       \
                to[i] = (value);                                                                                       \
            }                                                                                                          \
        }                                                                                                              \
        break;

/* Not inlined: optimizing it together with the loops around it takes a compiler three times as long, for nothing. */
CLONED static __attribute__((noinline)) void compute(const Instruction *at, double **reg, word block) {
    const word n = at->single ? 1 : block;
    double *restrict to = reg[at->to];
    const double *a = reg[at->a], *b = reg[at->b], *c = reg[at->c];
    const double s = at->number;
    switch (at->code) {
        UNARY(0, x)
        UNARY(1, -x)
        UNARY(2, fabs(x))
        UNARY(3, exp(x))
        UNARY(4, log(x))
        UNARY(5, log1p(x))
        UNARY(6, expm1(x))
        UNARY(7, sqrt(x))
        UNARY(8, 1.0 / x)
        UNARY(9, 1.0 / sqrt(x))
        UNARY(10, x * x)
        UNARY(11, 1.0 / (1.0 + exp(-x)))
        UNARY(12, tanh(x))
        UNARY(13, sin(x))
        UNARY(14, cos(x))
        UNARY(15, atan(x))
        UNARY(16, erf(x))
        UNARY(17, erfc(x))
        UNARY(18, (double)(x > 0.0) - (double)(x < 0.0))
        UNARY(19, x != x)
        UNARY(20, fabs(x) == INFINITY)
        UNARY(21, x == 0.0)
        UNARY(22, x != 0.0)
        UNARY(23, x * s)
        UNARY(24, x + s)
        UNARY(25, s - x)
        UNARY(26, x / s)
        UNARY(27, s / x)
        UNARY(28, pow(x, s))
        UNARY(29, x < s ? s : x)
        UNARY(30, x > s ? s : x)
        UNARY(31, x < s)
        UNARY(32, x <= s)
        UNARY(33, x > s)
        UNARY(34, x >= s)
        UNARY(35, x == s)
        UNARY(36, x != s)
        UNARY(37, x != x ? s : x)
        UNARY(38, x == INFINITY ? s : x)
        UNARY(39, x == -INFINITY ? s : x)
        UNARY(40, x * x * x)
        UNARY(41, floor(x))
        UNARY(42, tan(x))
        UNARY(43, sinh(x))
        UNARY(44, cosh(x))
        UNARY(45, asinh(x))
        UNARY(46, (double)(float)x)
        BINARY(64, x + y)
        BINARY(65, x - y)
        BINARY(66, x * y)
        BINARY(67, x / y)
        BINARY(68, pow(x, y))
        BINARY(69, (x > y || x != x) ? x : y)
        BINARY(70, (x < y || x != x) ? x : y)
        BINARY(71, x < y)
        BINARY(72, x <= y)
        BINARY(73, x > y)
        BINARY(74, x >= y)
        BINARY(75, x == y)
        BINARY(76, x != y)
        BINARY(77, x != 0.0 && y != 0.0)
        BINARY(78, x != 0.0 || y != 0.0)
        BINARY(79, y != 0.0 ? s : x)
        BINARY(80, y != y ? y : (x == 0.0 ? 0.0 : x * log(y)))
        case 96: /* where: c, of as many numbers as there are, or one */
        {
            const word p = at->a_step & 1, q = at->b_step, r = at->a_step >> 1;
            if (r && p && q)
                for (word i = 0; i < n; i++) to[i] = c[i] != 0.0 ? a[i] : b[i];
            else
                for (word i = 0; i < n; i++) to[i] = c[i * r] != 0.0 ? a[i * p] : b[i * q];
            break;
        }
    }
}

CLONED static double summed(const double *from, word n) {
    double part[8] = {0.0};
    word i = 0;
    for (; i + 8 <= n; i += 8)
        for (word j = 0; j < 8; j++) part[j] += from[i + j];
    for (; i < n; i++) part[i & 7] += from[i];
    return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

static inline double larger(double x, double y) { return (x > y || x != x) ? x : y; }
static inline double smaller(double x, double y) { return (x < y || x != x) ? x : y; }

/* Put a block of results where they belong: numbers are stored, added up, or compared with those that are there. */
CLONED static void put(const Memory *at, double *to, const double *from, word first, word n, const word *index, word single) {
    const word stride = at->stride[DIMS - 1], step = !single;
#define EACH(change)                                                                                                   \
    if (index)                                                                                                         \
        for (word i = 0; i < n; i++) {                                                                                 \
            double *o = to + index[first + i] * stride;                                                                \
            const double v = from[i * step];                                                                           \
            change;                                                                                                    \
        }                                                                                                              \
    else                                                                                                               \
        for (word i = 0; i < n; i++) {                                                                                 \
            double *o = to + (first + i) * stride;                                                                     \
            const double v = from[i * step];                                                                           \
            change;                                                                                                    \
        }
    switch (at->kind) {
    case STORE: EACH(*o = v) break;
    case ADD_UP:
        if (stride == 0 && !index)
            *to += single ? (double)n * from[0] : summed(from, n);
        else if (stride == 1 && !index && step)
            for (word i = 0; i < n; i++) to[first + i] += from[i];
        else if (index) { /* of equal indices in a row, numbers are summed first: memory is slow to add to */
            double sum = 0.0;
            for (word i = 0; i < n; i++) {
                sum += from[i * step];
                if (i + 1 == n || index[first + i + 1] != index[first + i]) {
                    to[index[first + i] * stride] += sum;
                    sum = 0.0;
                }
            }
        }
        else
            EACH(*o += v)
        break;
    case LARGEST: EACH(*o = larger(*o, v)) break;
    case SMALLEST: EACH(*o = smaller(*o, v)) break;
    }
#undef EACH
}

CLONED static void run_nest(const Nest *nest, double **arrays, double *scratch, double **reg) {
    const Fill *fills = (const Fill *)(nest + 1);
    const Memory *memories = (const Memory *)(fills + nest->fills);
    const Instruction *program = (const Instruction *)(memories + nest->memories);
    const word inner = nest->size[DIMS - 1];
    word at[DIMS] = {0};
    for (word f = 0; f < nest->fills; f++) {
        double *to = arrays[fills[f].array] + fills[f].offset;
        for (word i = 0; i < fills[f].count; i++) to[i] = fills[f].number;
    }
    for (;;) {
        for (word first = 0; first < inner; first += BLOCK) {
            const word n = inner - first < BLOCK ? inner - first : BLOCK;
            double *place[nest->memories + 1];
            for (word m = 0; m < nest->memories; m++) {
                const Memory *mem = memories + m;
                double *from = arrays[mem->array] + mem->offset;
                const word *index = mem->index < 0 ? 0 : (const word *)arrays[mem->index];
                for (word d = 0; d < DIMS - 1; d++)
                    from += (index && mem->along == d ? index[at[d]] : at[d]) * mem->stride[d];
                if (mem->along != DIMS - 1) index = 0;
                place[m] = from;
                if (mem->kind == LOAD) {
                    const word stride = mem->stride[DIMS - 1];
                    double *to = scratch + mem->reg * BLOCK;
                    if (index)
                        for (word i = 0; i < n; i++) to[i] = from[index[first + i] * stride];
                    else if (stride > 1 || stride < 0)
                        for (word i = 0; i < n; i++) to[i] = from[(first + i) * stride];
                    else
                        to = from + first * stride;
                    reg[mem->reg] = to;
                } else if (mem->kind == STORE_AT_ONCE)
                    reg[mem->reg] = from + first;
            }
            for (word k = 0; k < nest->instructions; k++) compute(program + k, reg, n);
            for (word m = 0; m < nest->memories; m++) {
                const Memory *mem = memories + m;
                if (mem->kind == LOAD || mem->kind == STORE_AT_ONCE) continue;
                const word *index = mem->index < 0 || mem->along != DIMS - 1 ? 0 : (const word *)arrays[mem->index];
                put(mem, place[m], reg[mem->reg & 0xffffffff], first, n, index, mem->reg >> 32);
            }
        }
        word d = DIMS - 2;
        while (d >= 0 && ++at[d] >= nest->size[d]) at[d--] = 0;
        if (d < 0) break;
    }
}

/* Numbers of one row that are multiplied at once; a compiler makes of them what the processor has. */
typedef double wide __attribute__((vector_size(8 * WIDE), aligned(8), may_alias));

/* Multiply four rows of a by the columns of b, of which `packed` has WIDE next to each other, row after row. */
CLONED static void multiply(const Product *p, const double *a, const double *packed, double *c, word rows) {
    const word down = p->a.row, step = p->a.column;
    const double *a0 = a, *a1 = rows > 1 ? a + down : a, *a2 = rows > 2 ? a + 2 * down : a,
                 *a3 = rows > 3 ? a + 3 * down : a;
    for (word first = 0; first < p->columns; first += WIDE) {
        wide sum[4] = {{0.0}};
        for (word k = 0; k < p->inner; k++, packed += WIDE) {
            const wide b = *(const wide *)packed;
            sum[0] += a0[k * step] * b;
            sum[1] += a1[k * step] * b;
            sum[2] += a2[k * step] * b;
            sum[3] += a3[k * step] * b;
        }
        const word columns = p->columns - first < WIDE ? p->columns - first : WIDE;
        for (word i = 0; i < rows; i++)
            for (word j = 0; j < columns; j++) c[i * p->c.row + (first + j) * p->c.column] = sum[i][j];
    }
}

static void run_product(const Product *p, double **arrays, double *pack) {
    for (word q = 0; q < p->batch; q++) {
        const double *a = arrays[p->a.array] + p->a.offset + q * p->a.next;
        const double *b = arrays[p->b.array] + p->b.offset + q * p->b.next;
        double *c = arrays[p->c.array] + p->c.offset + q * p->c.next;
        double *to = pack;
        for (word first = 0; first < p->columns; first += WIDE)
            for (word k = 0; k < p->inner; k++)
                for (word j = 0; j < WIDE; j++, to++)
                    *to = first + j < p->columns ? b[k * p->b.row + (first + j) * p->b.column] : 0.0;
        for (word row = 0; row < p->rows; row += 4)
            multiply(p, a + row * p->a.row, pack, c + row * p->c.row, p->rows - row < 4 ? p->rows - row : 4);
    }
}

/* Run nests and products one after the other. Registers are blocks of the scratch space; behind them, one of the
   matrices of a product is packed. */
void run_program(const word *program, word words, double **arrays, double *scratch, word registers) {
    double *reg[registers + 1];
    for (const word *end = program + words; program < end; program += ((const Nest *)program)->words) {
        for (word r = 0; r < registers; r++) reg[r] = scratch + r * BLOCK;
        if (((const Nest *)program)->memories == PRODUCT)
            run_product((const Product *)program, arrays, scratch + registers * BLOCK);
        else
            run_nest((const Nest *)program, arrays, scratch, reg);
    }
}
