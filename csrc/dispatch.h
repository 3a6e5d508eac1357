// The table of kernels of one instruction set, and the choice among them.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace synthward {

// What names one cipher stream: key, purpose stream (15 bits) and logical step (48 bits).
struct NoiseStream {
  uint32_t key[8];
  uint64_t nonce;
};

struct AdamArgs {
  float *param, *grad, *m, *v;
  float noise_std, grad_scale, beta1, beta2, weight_decay;
  float step_size, eps, bias2_sqrt_inv, decay_factor;
  int decoupled;
};

struct SgdArgs {
  float *param, *grad, *momentum_buffer;
  float noise_std, grad_scale, lr, momentum, dampening, weight_decay;
  int nesterov, first_step;
};

struct KernelTable {
  const char* name;
  // 16 words of each of 16 consecutive blocks, out[word * 16 + block].
  void (*chacha_blocks16)(const uint32_t* state, uint64_t counter, uint32_t* out);
  void (*gaussian)(const NoiseStream*, int64_t start, int64_t count, float* out);
  void (*add_gaussian)(const NoiseStream*, int64_t start, int64_t count, float std, float* out);
  void (*adam)(const NoiseStream*, int64_t start, int64_t from, int64_t to, const AdamArgs*);
  void (*sgd)(const NoiseStream*, int64_t start, int64_t from, int64_t to, const SgdArgs*);
  void (*outer_sq_norms)(const float* a, const float* g, const int64_t* offsets, int64_t from, int64_t to,
                         int64_t d, int64_t p, float* out);
  void (*diagonal_sq_norms)(const float* rows, const float* factors, const int64_t* offsets, int64_t from,
                            int64_t to, int64_t p, float* out);
  void (*scatter_sq_norms)(const int64_t* ids, const float* g, const int64_t* offsets, int64_t from,
                           int64_t to, int64_t p, float* out);
  void (*scale_rows)(const float* x, const float* weights, int64_t from, int64_t to, int64_t p, float* out);
};

// The table in use: the best that the processor runs, unless one was forced.
const KernelTable& kernels();
std::vector<std::string> available_isas();
// Empty name: back to the best. False when the processor or the build does not have it.
bool force_isa(const std::string& name);

}  // namespace synthward
