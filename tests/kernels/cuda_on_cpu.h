// Runs a CUDA kernel on the CPU, lane by lane: threads of a block are coroutines that meet where
// the kernel synchronises. Copies to shared memory happen when they are waited for, not before: a
// read that comes too early finds other bytes.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <vector>

#define ON_CPU
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define ALL 0xffffffffu
using std::min;

struct Index {
  int x, y;
};
typedef Index int2;
static Index threadIdx, blockIdx;

static const int kThreads = 32 * WARPS, kStack = 1 << 16;
static ucontext_t scheduler, threads[kThreads];
static bool finished[kThreads];
static long idle;  // turns since a thread got anywhere

static void yield_turn() {
  const int own = threadIdx.x;
  if (++idle > 100000) {
    fprintf(stderr, "deadlock: threads wait for others that took another way\n");
    abort();
  }
  swapcontext(&threads[own], &scheduler);
}

struct Barrier {
  int arrived = 0, generation = 0;
  void meet(int all) {
    const int before = generation;
    idle = 0;
    if (++arrived == all) {
      arrived = 0;
      generation++;
    }
    while (generation == before) yield_turn();
  }
};
static Barrier warps[WARPS], block;

static void __syncwarp() { warps[threadIdx.x / 32].meet(32); }
static void __syncthreads() { block.meet(kThreads); }

template <class T> static T exchange(T value, int source) {
  static T slots[kThreads];
  const int own = threadIdx.x;
  slots[own] = value;
  __syncwarp();
  const T result = slots[own / 32 * 32 + source];
  __syncwarp();
  return result;
}
template <class T> static T __shfl_sync(unsigned, T value, int source) {
  return exchange(value, source);
}
static void add_from_below(uint32_t* value, int distance) {
  const int lane = threadIdx.x % 32;
  const bool inside = lane % (BLOCK / 32) >= distance;
  const uint32_t below = exchange(*value, inside ? lane - distance : lane);
  if (inside) *value += below;
}
static uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return (uint32_t)(((uint64_t)high << 32 | low) >> (shift & 31));
}
template <class T> static T keep(T value) { return value; }
static int __popc(uint32_t bits) { return __builtin_popcount(bits); }
static float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static float float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return __uint_as_float((uint32_t)(bits & 0x8000) << 16 | 0x7f800000 | fraction << 13);
  const float size = exponent ? (float)(1024 + fraction) : (float)fraction;
  const float value = __builtin_ldexpf(size, (exponent ? exponent : 1) - 25);
  return bits & 0x8000 ? -value : value;
}

typedef std::vector<std::pair<uint8_t*, const uint8_t*>> Copies;
static std::deque<Copies> pending[kThreads];
static Copies opened[kThreads];

typedef uint8_t* Shared;
static Shared shared_address(void* at) { return (Shared)at; }
static uint16_t read_u16(Shared at) {
  uint16_t bits;
  memcpy(&bits, at, 2);
  return bits;
}
static uint32_t read_u32(Shared at) {
  uint32_t bits;
  memcpy(&bits, at, 4);
  return bits;
}
static void copy_unit(Shared to, const uint8_t* from, int wanted) {
  if (wanted) opened[threadIdx.x].push_back({to, from});
}
static void end_of_copies() {
  pending[threadIdx.x].push_back(std::move(opened[threadIdx.x]));
  opened[threadIdx.x].clear();
}
static void wait_for_copies() {
  std::deque<Copies>& own = pending[threadIdx.x];
  while (own.size() > STAGES - 1) {
    for (auto& copy : own.front()) memcpy(copy.first, copy.second, 16);
    own.pop_front();
  }
}

static std::function<void()> body;
static void enter() {
  body();
  finished[threadIdx.x] = true;
  swapcontext(&threads[threadIdx.x], &scheduler);
}

static void run_block(Index which) {
  static std::vector<char> stacks(kThreads * kStack);
  blockIdx = which;
  for (int t = 0; t < kThreads; t++) {
    finished[t] = false;
    pending[t].clear();
    getcontext(&threads[t]);
    threads[t].uc_stack.ss_sp = stacks.data() + t * kStack;
    threads[t].uc_stack.ss_size = kStack;
    threads[t].uc_link = nullptr;
    makecontext(&threads[t], enter, 0);
  }
  for (int left = kThreads; left > 0;) {
    left = 0;
    for (int t = 0; t < kThreads; t++) {
      if (finished[t]) continue;
      threadIdx.x = t;
      swapcontext(&scheduler, &threads[t]);
      left += !finished[t];
    }
  }
}

static void run_grid(int columns, int rows, std::function<void()> kernel) {
  body = kernel;
  for (int y = 0; y < rows; y++)
    for (int x = 0; x < columns; x++) run_block({x, y});
}
