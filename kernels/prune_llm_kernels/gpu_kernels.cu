// packed_linear in CUDA C++, compiled at run time (gpu_cuda.py): partials[split] = x W^T over the
// listed channels of a packed weight. What gpu_triton.packed_linear computes, with half of the
// instructions: segments are copied to shared memory while earlier ones are multiplied, so that a
// weight's address is one 32-bit register.
//
// Compiled with: BLOCK outputs of a block, B rows, WARPS, STAGES of a warp's ring, PARTS of a group,
// CHUNK channels of a list, LISTED (else every channel is read and columns is a multiple of CHUNK),
// BFLOAT16 (else float16). A grid of (blocks, splits), 32 * WARPS threads.
//
// A warp takes GROUP channels at a time, in PARTS whose masks together have a word for every lane;
// more parts share what a turn of the loop costs. A lane owns nibble `lane % 8` of words
// `lane / 8 + 4 q`: four neighbouring outputs each. The tests run this file on the CPU, lane by lane.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define WORDS (BLOCK / 32)
#define PART (32 / WORDS)     // channels whose masks have a word for every lane
#define GROUP (PARTS * PART)  // channels that a warp takes at a time
#define NIBBLES (BLOCK / 128)  // of a lane, in a channel
#define SEGMENT (BLOCK / 8 + 2 * BLOCK)  // bytes, all kept

#ifndef ON_CPU
#define ALL 0xffffffffu

typedef u32 Shared;  // an address in shared memory
__device__ __forceinline__ Shared shared_address(const void* at) {
  return (Shared)__cvta_generic_to_shared(at);
}
__device__ __forceinline__ u16 read_u16(Shared at) {
  u16 bits;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(at) : "memory");
  return bits;
}
__device__ __forceinline__ u32 read_u32(Shared at) {
  u32 bits;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bits) : "r"(at) : "memory");
  return bits;
}
// Nothing is copied where it is not wanted.
__device__ __forceinline__ void copy_unit(Shared to, const u8* from, int wanted) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16;}"
               ::"r"(to), "l"(from), "r"(wanted) : "memory");
}
// Add what the lane `distance` below has, where it is one of the same WORDS.
__device__ __forceinline__ void add_from_below(u32* value, int distance) {
  asm volatile(
      "{.reg .pred p; .reg .b32 t; shfl.sync.up.b32 t|p, %0, %1, %2, -1; @p add.u32 %0, %0, t;}"
      : "+r"(*value) : "r"(distance), "n"((32 - WORDS) << 8));
}
// A value that stays in its register: the compiler would compute it again at every use.
template <class T> __device__ __forceinline__ T keep(T value) {
  asm volatile("" : "+r"(value));
  return value;
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

// Start to copy the segments of a group, if there is one; `to` and `data` are the lane's.
__device__ __forceinline__ void fetch(Shared to, const Cursor* at, const int* listed,
                                      const int* starts, const u8* data, int lane, int end) {
  if (at->chunk < end) {
    const int place = at->chunk * CHUNK + at->place;
    int channels[GROUP];
#pragma unroll
    for (int k = 0; k < GROUP; k += 2) {
      const int2 pair = LISTED ? *(const int2*)(listed + place + k) : int2{place + k, place + k + 1};
      channels[k] = pair.x, channels[k + 1] = pair.y;
    }
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
      const int* start = starts + channels[k];
      const int first = start[0], left = start[1] - first - lane;
      const u8* from = data + (long long)first * 16;
#pragma unroll
      for (int i = 0; i < (SEGMENT / 16 + 31) / 32; i++)
        copy_unit(to + k * SEGMENT + i * 512, from + i * 512, left > i * 32);
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
  const int shift = 4 * (lane % 8), turn = keep(shift - 1);
  const u32 lower = keep((1u << shift) - 1);
  int owned[PART * NIBBLES];  // places of the lane's words in a part
#pragma unroll
  for (int i = 0; i < PART * NIBBLES; i++) owned[i] = keep(i * 4 + lane / 8);
  const int end = min((int)(blockIdx.y + 1) * per_split, chunks);
  const Shared own = keep(shared_address(ring + warp * STAGES * GROUP * SEGMENT));
  starts += (long long)blockIdx.x * columns;
  data += lane * 16;

  Cursor use = {(int)blockIdx.y * per_split, GROUP * warp};
  settle(&use, counts, warp, end);
  Cursor next = use, ahead[STAGES];  // what is being fetched
#pragma unroll
  for (int stage = 0; stage < STAGES; stage++) {
    ahead[stage] = next;
    fetch(own + lane * 16 + stage * GROUP * SEGMENT, &next, listed, starts, data, lane, end);
    advance(&next, counts, warp, end);
  }

  float sums[B][NIBBLES][4] = {};
  int stage = 0;
  while (use.chunk < end) {
    // a row that is not there is the last one again: its sums are written nowhere
    u32 pairs[B][GROUP / 2];
#pragma unroll
    for (int b = 0; b < B; b++) {
      const int row = b ? min(b, rows - 1) : 0;
      const u16* at = LISTED ? x + (use.chunk * rows + row) * CHUNK + use.place
                             : x + row * columns + use.chunk * CHUNK + use.place;
#pragma unroll
      for (int k = 0; k < GROUP / 2; k++) pairs[b][k] = ((const u32*)at)[k];
    }
    wait_for_copies();
    __syncwarp();
    const Shared group = keep(own + stage * GROUP * SEGMENT);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      const Shared segments = group + part * PART * SEGMENT;
      // lane / WORDS is the channel of the part, lane % WORDS the word of its mask
      const u32 mask = read_u32(segments + lane / WORDS * SEGMENT + lane % WORDS * 4);
      const u32 ones = __popc(mask);
      u32 before = ones;
#pragma unroll
      for (int distance = 1; distance < WORDS; distance *= 2) add_from_below(&before, distance);
      // where the word's first value lies
      const Shared place = segments + lane / WORDS * SEGMENT + BLOCK / 8 + 2 * (before - ones);
#pragma unroll
      for (int k = 0; k < PART; k++) {
        const int channel = part * PART + k;
        float inputs[B];
#pragma unroll
        for (int b = 0; b < B; b++)
          inputs[b] = to_float((u16)(pairs[b][channel / 2] >> (channel % 2 * 16)));
#pragma unroll
        for (int q = 0; q < NIBBLES; q++) {
          const int from = owned[k * NIBBLES + q];
          const u32 word = __shfl_sync(ALL, mask, from);
          Shared at = __shfl_sync(ALL, place, from) + 2 * __popc(word & lower);
          const u32 nibble = __funnelshift_r(word, word, turn);  // in bits 1 to 4
#pragma unroll
          for (int j = 0; j < 4; j++) {
            // read in any case: the compiler need not branch
            const float weight = to_float(read_u16(at));
            if (nibble >> j & 2) {
              at += 2;
#pragma unroll
              for (int b = 0; b < B; b++) sums[b][q][j] += weight * inputs[b];
            }
          }
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 1; i < STAGES; i++) ahead[i - 1] = ahead[i];
    ahead[STAGES - 1] = next;
    fetch(group + lane * 16, &next, listed, starts, data, lane, end);
    advance(&next, counts, warp, end);
    use = ahead[0];
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
