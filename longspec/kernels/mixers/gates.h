/* Sigmoids and what is made of them: the same bits wherever a value stands, and on every processor. */
#ifndef GATES_H
#define GATES_H

#include "simd.h"

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }
INLINE vf silu(vf x) { return x / (1.0f + exponential(-x)); }

/* log(1 + e^x) = max(x, 0) + log(1 + y) with y = e^-|x|, and that is 2 artanh(y / (2 + y)): eight terms of its series, whose
 * argument is a third at most. */
INLINE float softplus(float x) {
    const float y = one_exponential(x > 0 ? -x : x), z = y / (2.0f + y), square = z * z;
    float sum = 1.0f / 15;
    for (int odd = 13; odd > 0; odd -= 2) sum = sum * square + 1.0f / (float)odd;
    return (x > 0 ? x : 0) + 2.0f * z * sum;
}

#endif
