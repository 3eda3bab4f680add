/* Products of weights and rows, by the instructions of the processor that this is compiled for.
 *
 * One header is taken, and each has the same:
 *
 *     begin_tiles, end_tiles  what a thread does before its products and after them (AMX; elsewhere nothing)
 *     pack_columns            32 columns of up to 16 rows x, as the products read them; packed_bytes is a tile's size
 *     product_bf16            sums of 16 outputs for packed rows; product_pair of 32
 *     weigh                   weights of columns times their values: attention's second product
 *     group_dot               exact integer sums of 16 outputs over a group of 32 codes
 *     HAS_TILES, BY_TILES     whether codes go by tiles, and from how many of 16 rows on
 *
 * The order of bf16's sums is that of TDPBF16PS (Intel's manual): 32 columns at a time; in these the even and the odd
 * columns each have a sum of their own, added to column by column; then both sums are added, and that to what was before.
 * So the bits are the same everywhere, but for denormals, which AMX flushes to zero.
 */
#ifndef DOT_H
#define DOT_H

#include "simd.h"

enum { TILE = 16, DEEP = 32, GROUP = 32, WORDS = 8 };

#if defined(ISA_AMX)
#include "dot/amx.h"
#elif defined(__AVX512BW__)
#include "dot/avx512.h"
#include "dot/fma.h"
#elif defined(__AVX2__)
#include "dot/avx2.h"
#include "dot/fma.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "dot/neon.h"
#include "dot/fma.h"
#else
#include "dot/scalar.h"
#include "dot/fma.h"
#endif

#endif
