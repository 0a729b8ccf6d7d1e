// GELU (its approximation by tanh) of a gate, times what it lets through.

#pragma once

#include "hopper.cuh"

__device__ __forceinline__ float gelu_times(float gate, float up) {
    return __fdividef(gate, 1.0f + __expf(-1.5957691216057308f * (gate + 0.044715f * gate * gate * gate))) * up;
}
