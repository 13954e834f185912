// packed_linear in CUDA C++, compiled at run time (gpu_cuda.py): partials[split] = x W^T over the
// listed channels of a packed weight. What gpu_triton.packed_linear computes, with fewer
// instructions: segments are copied to shared memory while earlier ones are multiplied, so that a
// weight's address is one 32-bit register.
//
// Compiled with: BLOCK outputs of a block, B rows, WARPS, STAGES of a warp's ring, CHUNK channels of
// a list, LISTED (else every channel is read and columns is a multiple of CHUNK), BFLOAT16 (else
// float16). A grid of (blocks, splits), 32 * WARPS threads.
//
// A warp takes GROUP channels at a time, whose masks together have a word for every lane. A lane
// owns nibble `lane % 8` of words `lane / 8 + 4 q`: four neighbouring outputs each. The tests run
// this file on the CPU, lane by lane.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define WORDS (BLOCK / 32)
#define GROUP (32 / WORDS)
#define NIBBLES (BLOCK / 128)  // of a lane, in a channel
#define SEGMENT (BLOCK / 8 + 2 * BLOCK)  // bytes, all kept

#ifndef ON_CPU
#define ALL 0xffffffffu

__device__ __forceinline__ void copy_unit(u8* to, const u8* from) {
  u32 address = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
}
__device__ __forceinline__ float float16(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
#endif

__device__ __forceinline__ float to_float(u16 bits) {
#if BFLOAT16
  return __uint_as_float((u32)bits << 16);
#else
  return float16(bits);
#endif
}

// Which channels a warp reads next: GROUP places of a chunk, then those of the next warps are left out.
struct Cursor {
  int chunk, place;
};

__device__ __forceinline__ int listed_in(const int* counts, int chunk) {
  return LISTED ? counts[chunk] : CHUNK;
}

__device__ __forceinline__ void settle(Cursor* at, const int* counts, int warp, int end) {
  while (at->chunk < end && at->place >= listed_in(counts, at->chunk)) {
    at->chunk++;
    at->place = GROUP * warp;
  }
}

__device__ __forceinline__ void advance(Cursor* at, const int* counts, int warp, int end) {
  at->place += GROUP * WARPS;
  settle(at, counts, warp, end);
}

// Start to copy the segments of a group, if there is one.
__device__ __forceinline__ void fetch(
    u8* to, const Cursor* at, const int* listed, const int* starts, const u8* data, int lane, int end) {
  if (at->chunk < end) {
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
      const int place = at->chunk * CHUNK + at->place + k;
      const int channel = LISTED ? listed[place] : place;
      const int first = starts[channel], units = starts[channel + 1] - first;
      const u8* from = data + (size_t)first * 16;
#pragma unroll
      for (int i = 0; i < (SEGMENT / 16 + 31) / 32; i++) {
        const int unit = i * 32 + lane;
        if (unit < units) copy_unit(to + k * SEGMENT + unit * 16, from + unit * 16);
      }
    }
  }
  end_of_copies();
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) packed_linear(
    const u16* __restrict__ x, const int* __restrict__ listed, const int* __restrict__ counts,
    const u8* __restrict__ data, const int* __restrict__ starts, float* __restrict__ partials,
    int rows, int columns, int outputs, int per_split, int chunks) {
  // 16 bytes more: a lane reads four values and counts those that its mask has
  __shared__ __align__(16) u8 ring[WARPS * STAGES * GROUP * SEGMENT + 16];
  // by a shuffle, so that the compiler knows a warp to take one way through every branch
  const int lane = threadIdx.x % 32, warp = __shfl_sync(ALL, threadIdx.x / 32, 0);
  const int shift = 4 * (lane % 8);
  const u32 lower = (1u << shift) - 1;
  const int end = min((int)(blockIdx.y + 1) * per_split, chunks);
  u8* own = ring + warp * STAGES * GROUP * SEGMENT;
  starts += (size_t)blockIdx.x * columns;

  Cursor use = {(int)blockIdx.y * per_split, GROUP * warp};
  settle(&use, counts, warp, end);
  Cursor next = use;
  for (int stage = 0; stage < STAGES; stage++) {
    fetch(own + stage * GROUP * SEGMENT, &next, listed, starts, data, lane, end);
    advance(&next, counts, warp, end);
  }

  float sums[B][NIBBLES][4] = {};
  int stage = 0;
  while (use.chunk < end) {
    wait_for_copies();
    __syncwarp();
    u8* group = own + stage * GROUP * SEGMENT;
    // lane / WORDS is the channel of the group, lane % WORDS the word of its mask
    const u32 mask = ((const u32*)(group + lane / WORDS * SEGMENT))[lane % WORDS];
    const int ones = __popc(mask);
    int before = ones;
#pragma unroll
    for (int distance = 1; distance < WORDS; distance *= 2) {
      const int lower_words = __shfl_up_sync(ALL, before, distance, WORDS);
      if (lane % WORDS >= distance) before += lower_words;
    }
    before -= ones;
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
      float inputs[B];
#pragma unroll
      for (int b = 0; b < B; b++) {
        const int place = use.place + k;
        const int at = LISTED ? (use.chunk * rows + b) * CHUNK + place
                              : b * columns + use.chunk * CHUNK + place;
        inputs[b] = b < rows ? to_float(x[at]) : 0.0f;
      }
      const u8* values = group + k * SEGMENT + BLOCK / 8;
#pragma unroll
      for (int q = 0; q < NIBBLES; q++) {
        const int from = k * WORDS + q * 4 + lane / 8;
        const u32 word = __shfl_sync(ALL, mask, from);
        const int first = __shfl_sync(ALL, before, from);
        const u16* at = (const u16*)values + first + __popc(word & lower);
        const u32 nibble = word >> shift;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float weight = to_float(*at);  // read in any case: the compiler need not branch
          if (nibble >> j & 1) {
            at++;
#pragma unroll
            for (int b = 0; b < B; b++) sums[b][q][j] += weight * inputs[b];
          }
        }
      }
    }
    __syncwarp();
    fetch(group, &next, listed, starts, data, lane, end);
    advance(&next, counts, warp, end);
    advance(&use, counts, warp, end);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }

  // the warps' sums, in their order; one row at a time in the memory of the ring
  float* shared = (float*)ring;
  for (int b = 0; b < rows; b++) {
    __syncthreads();
#pragma unroll
    for (int row = 0; row < B; row++) {
      if (row != b) continue;
#pragma unroll
      for (int q = 0; q < NIBBLES; q++) {
        const int at = warp * BLOCK + (q * 4 + lane / 8) * 32 + shift;
#pragma unroll
        for (int j = 0; j < 4; j++) shared[at + j] = sums[row][q][j];
      }
    }
    __syncthreads();
    for (int o = threadIdx.x; o < BLOCK; o += 32 * WARPS) {
      const int output = blockIdx.x * BLOCK + o;
      float total = 0.0f;
      for (int w = 0; w < WARPS; w++) total += shared[w * BLOCK + o];
      if (output < outputs) partials[((size_t)blockIdx.y * rows + b) * outputs + output] = total;
    }
  }
}
