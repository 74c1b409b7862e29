// A causal 3 x 3 x 3 convolution for Hopper's tensor cores.
//
// Activations are float16 or bfloat16, channels innermost, [B, F, H, W, C]; two frames come before
// (`past`). conv.py compiles it for each type and pair of channel counts, with
//   CIN      input channels, a multiple of 16
//   COUT     output channels, a multiple of 32, or 8 of which three are wanted: the pixels
//   BLOCKS   blocks of 8 x 8 pixels that a warpgroup computes
//   STAGES   steps that lie ready in shared memory
// and with what depends on the type: `wgmma`, one m64nCOUTk16 instruction, and `pack`, which rounds
// two sums (float16 to infinity beyond 65504). Nothing else here looks into a number.
//
// A tile is 16 x 8*BLOCKS pixels of one frame with all their output channels. Its sum over inputs
// goes in steps of one frame and 16 channels: a step holds these channels of the tile and of a border
// of one pixel, and the weights of nine taps. In shared memory 8 channels of a pixel (16 bytes) lie
// beside those of its right neighbour, without swizzle: tensor cores read that layout, and in it the
// next tap is the same matrix from another first address on. So an input is fetched once for nine
// taps, where the usual implicit product fetches it nine times.
//
// Two warpgroups multiply, half a tile each. The third brings the steps.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short number; // 16 bits of either type

constexpr int TILE_H = 16, TILE_W = 8 * BLOCKS;
constexpr int PITCH = TILE_W + 2, PIXELS = (TILE_H + 2) * PITCH;
constexpr int PLANE = PIXELS * 16;          // bytes of 8 channels
constexpr int INPUT_BYTES = 2 * PLANE;      // 16 channels
constexpr int WEIGHT_BYTES = 9 * 32 * COUT; // 9 taps of 16 channels
constexpr int STAGE_BYTES = INPUT_BYTES + WEIGHT_BYTES;
constexpr int STAGED_BYTES = 2 * COUT + 16; // a pixel's sums and a gap, lest rows meet in a bank
constexpr int SLICES = CIN / 16;
constexpr int MULTIPLIERS = 256, BRINGERS = 128; // threads
static_assert(PLANE % 128 == 64, "or the copies of two planes meet in the same banks");

// --- barriers and copies ---------------------------------------------------------------------

__device__ __forceinline__ void init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n"
      "}" ::"r"(barrier), "r"(parity) : "memory");
}

// --- the kernel ------------------------------------------------------------------------------

struct Problem {
  const number *x;       // [B, F, H, W, CIN]
  const number *past;    // [B, 2, H, W, CIN], null for zeros
  const number *weights; // [3, CIN / 16, 9, 2, COUT, 8]
  number *y;             // [B, F, H, W, COUT], or pixels [B, F, 3, H, W]
  int clips, frames, height, width;
  int tiles, across; // of all frames of all clips; in a row of a frame
};

struct Tile {
  int frame, clip, of, h, w; // `frame` of all, which is frame `of` of its clip

  // Frames of one place come one after another, so that what two of them read is still in the L2.
  __device__ Tile(const Problem &p, int index) {
    const int all = p.clips * p.frames, place = index / all;
    frame = index % all, clip = frame / p.frames, of = frame % p.frames;
    h = place / p.across * TILE_H, w = place % p.across * TILE_W;
  }

  // The first of the three frames seen that is not zeros.
  __device__ int first(const Problem &p) const { return p.past ? 0 : max(0, 2 - of); }
};

__device__ __forceinline__ void bring(const Problem &p, u32 stages, u32 full, u32 empty) {
  constexpr int COPIES = (PIXELS + BRINGERS / 2 - 1) / (BRINGERS / 2);
  const int thread = threadIdx.x - MULTIPLIERS, pixel = thread / 2, half = thread % 2;
  const long plane = (long)p.height * p.width * CIN;
  int step = 0;
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile tile(p, index);
    int from[COPIES]; // elements into a frame; -1 lies outside
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      const int at = pixel + i * (BRINGERS / 2);
      const int h = tile.h + at / PITCH - 1, w = tile.w + at % PITCH - 1;
      const bool inside = at < PIXELS && h >= 0 && h < p.height && w >= 0 && w < p.width;
      from[i] = inside ? (h * p.width + w) * CIN + half * 8 : -1;
    }
    for (int seen = tile.first(p); seen < 3; ++seen) {
      const int frame = tile.of + seen - 2;
      const number *source = frame < 0 ? p.past + (tile.clip * 2 + frame + 2) * plane
                                     : p.x + (tile.clip * p.frames + frame) * plane;
      for (int slice = 0; slice < SLICES; ++slice, ++step, source += 16) {
        const int stage = step % STAGES;
        const u32 to = stages + stage * STAGE_BYTES, ready = full + stage * 8;
        wait(empty + stage * 8, (step / STAGES & 1) ^ 1);
        if (thread == 0) {
          const number *weights = p.weights + (long)(seen * SLICES + slice) * (WEIGHT_BYTES / 2);
          asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(ready),
                       "n"(WEIGHT_BYTES) : "memory");
          asm volatile(
              "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
              ::"r"(to + INPUT_BYTES), "l"(weights), "n"(WEIGHT_BYTES), "r"(ready) : "memory");
        }
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
          const int at = pixel + i * (BRINGERS / 2);
          if (at >= PIXELS) break;
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + half * PLANE + at * 16),
                       "l"(source + max(from[i], 0)), "r"(from[i] < 0 ? 0 : 16) : "memory");
        }
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(ready) : "memory");
      }
    }
  }
}

__device__ __forceinline__ u64 descriptor(u32 address, u32 leading, u32 stride) {
  return (u64)(address >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32;
}

using Sums = float[BLOCKS][COUT / 2];

// Where the sums of a thread belong: `part` is a block and one of two lines of it that a warp holds.
struct Part {
  int h, w;
  bool inside;

  __device__ Part(const Problem &p, const Tile &tile, int part) {
    h = tile.h + threadIdx.x / 32 * 2 + part % 2, w = tile.w + part / 2 * 8 + threadIdx.x % 32 / 4;
    inside = h < p.height && w < p.width;
  }
};

// A warp takes 8 pixels of a line at a time through shared memory, after which a thread has groups of
// 8 channels. The loop stays one: unrolled, its instructions would be fetched anew for every tile.
__device__ __forceinline__ void store(const Problem &p, const Tile &tile, const Sums &acc, u32 staging) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quarter = lane % 4;
  const u32 row = staging + (warp * 8 + lane / 4) * STAGED_BYTES;
#pragma unroll 1
  for (int part = 0; part < 2 * BLOCKS; ++part) {
    const Part at(p, tile, part);
#pragma unroll
    for (int of = 0; of < 2 * BLOCKS; ++of) { // registers cannot be indexed
      if (of != part) continue;
#pragma unroll
      for (int j = 0; j < COUT / 8; ++j) {
        const float *pair = acc[of / 2] + 4 * j + of % 2 * 2;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(row + j * 16 + quarter * 4), "r"(pack(pair[0], pair[1]))
                     : "memory");
      }
    }
    __syncwarp();
    number *to = p.y + (((long)tile.frame * p.height + at.h) * p.width + at.w) * COUT + quarter * 8;
#pragma unroll
    for (int i = 0; i < COUT / 32; ++i) {
      uint4 group;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(group.x), "=r"(group.y), "=r"(group.z), "=r"(group.w)
                   : "r"(row + (i * 4 + quarter) * 16));
      if (at.inside) *(uint4 *)(to + i * 32) = group;
    }
    __syncwarp();
  }
}

__device__ __forceinline__ void store_pixels(const Problem &p, const Tile &tile, const Sums &acc) {
  const int quarter = threadIdx.x % 4;
  const long plane = (long)p.height * p.width;
#pragma unroll
  for (int part = 0; part < 2 * BLOCKS; ++part) {
    const Part at(p, tile, part);
    if (!at.inside || quarter > 1) continue;
    const float *pair = acc[part / 2] + part % 2 * 2;
    const u32 channels = pack(pair[0], pair[1]);
    number *to = p.y + ((long)tile.frame * 3 + quarter * 2) * plane + (long)at.h * p.width + at.w;
    to[0] = (number)channels;
    if (quarter == 0) to[plane] = (number)(channels >> 16);
  }
}

__device__ __forceinline__ void multiply(const Problem &p, u32 stages, u32 staging, u32 full, u32 empty) {
  const int group = threadIdx.x / 128;
  const bool leader = threadIdx.x % 32 == 0;
  Sums acc;
  int step = 0;
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile tile(p, index);
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
      for (int i = 0; i < COUT / 2; ++i) acc[block][i] = 0;
    }
    const int begin = step, end = step + (3 - tile.first(p)) * SLICES;
    for (; step < end; ++step) {
      const int stage = step % STAGES;
      wait(full + stage * 8, step / STAGES & 1);
      // Inputs come by ordinary copies, and tensor cores read through another proxy.
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      const u32 input = stages + stage * STAGE_BYTES;
      const u64 pixels = descriptor(input + group * 8 * PITCH * 16, PLANE, PITCH * 16);
      const u64 weights = descriptor(input + INPUT_BYTES, COUT * 16, 128);
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
          wgmma(acc[block], pixels + (tap / 3 * PITCH + tap % 3 + block * 8), weights + tap * 2 * COUT);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (leader && step > begin) arrive(empty + (step - 1) % STAGES * 8);
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (leader) arrive(empty + (step - 1) % STAGES * 8);
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
      for (int i = 0; i < COUT / 2; ++i) asm volatile("" : "+f"(acc[block][i])::"memory");
    }
    if constexpr (COUT == 8) store_pixels(p, tile, acc);
    else store(p, tile, acc, staging);
  }
}

extern "C" __global__ void __launch_bounds__(MULTIPLIERS + BRINGERS, 1)
    convolve(const __grid_constant__ Problem p) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ u64 barriers[2 * STAGES];
  const u32 stages = (u32)__cvta_generic_to_shared(memory);
  const u32 full = (u32)__cvta_generic_to_shared(barriers), empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      init(full + 8 * i, BRINGERS + 1); // each its copies, and one of them the weights
      init(empty + 8 * i, MULTIPLIERS / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  // Registers go from who moves to who multiplies; the sum is what the block was started with.
  if (threadIdx.x >= MULTIPLIERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    bring(p, stages, full, empty);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    multiply(p, stages, stages + STAGES * STAGE_BYTES, full, empty);
  }
}
