// The forward pass of cpu_attention.cpp, for cpu_blocks.cpp.

#pragma once

#include <cstdint>

extern "C" {

struct Tensor {  // its strides, in elements; the last one is 1
  void* data;
  int64_t batch, head, row;
};

struct Forward {  // q, out (batches, heads, queries, dim), k, v (batches, heads, keys, dim), lse or null, contiguous
  Tensor q, k, v, out;
  float* lse;
  int64_t batches, heads, queries, keys, dim;
  float factor;        // scale / ln 2
  int pairs, threads;  // pairs of bf16 are multiplied as such
};

int attention_forward_fp32(const Forward* f);
int attention_forward_bf16(const Forward* f);
int attention_forward_fp16(const Forward* f);
}
