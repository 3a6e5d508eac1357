// What the kernels of one instruction set look like from outside: plain pointers and lengths, C types alone.
// The per-set sources include this and no standard header, so that they emit no symbol that another source
// could pick up with the wrong instructions.
#pragma once
#include <stdint.h>

namespace synthward {

// What names one cipher stream: key, and nonce = stream (15 bits) << 48 | logical step (48 bits).
struct NoiseStream {
  uint32_t key[8];
  uint64_t nonce;
};

// Noise that is correlated over steps (core/correlated.inl): taps are those of this step and the ones before it. state
// holds num_slots rows, row_stride floats from one to the next.
struct Correlation {
  const float *taps, *weights, *decays, *gains;
  int64_t num_taps, num_slots, row_stride;
  float* state;
};

// Scalars are rounded to float once, from the doubles that torch.optim computes with.
struct AdamArgs {
  float *param, *grad, *exp_avg, *exp_avg_sq;
  float noise_std, grad_scale, one_minus_beta1, beta2, one_minus_beta2;
  float l2, keep;  // weight decay in the gradient; factor of decoupled weight decay
  float step_size, eps, bias2_sqrt_inv;
  // Where corrected: the noise's part of the second moment is taken off, and what is left kept above a floor.
  float bias2_inv, bias_variance, min_second_moment;
  int is_corrected;
};

struct SgdArgs {
  float *param, *grad, *momentum_buffer;
  float noise_std, grad_scale, lr, momentum, one_minus_dampening, weight_decay;
  int nesterov, first_step;
};

// Sums on a grid, a power of two: per_grid is 1 / grid, scale the noise's standard deviation over the grid.
struct ReleaseArgs {
  double* sums;
  float* out;
  double grid, per_grid, scale;
};

// A convolution of images [groups * channels][size...] to [groups * outputs][out...]; channels and outputs are those
// of one group, axes that are not there have length 1. padding is that before the first place.
struct ConvShape {
  int64_t groups, channels, outputs;
  int64_t size[3], kernel[3], stride[3], padding[3], dilation[3], out[3];
};

// A residual network of a sampler (core/decode.inl): its first layer is silu(sums + common + values value_weights) with
// rows of `width`, `numbers` values a row; panels are those of residual_pack, one set for each block and one whose norm is
// the last.
struct ResidualArgs {
  const float *sums, *common, *values, *value_weights, *panels;
  int64_t width, numbers, blocks;
  float eps;
  float* features;
};

// `count` tokens a row, each of a column whose tokens are rows offsets[column] .. offsets[column + 1] of the weight. Where
// there is a table, the row of every token that is drawn is added to the row's sum.
struct DrawArgs {
  const float *features, *weight, *bias, *uniforms, *table;
  const int64_t *offsets, *columns;
  int64_t width, count, table_width;
  int64_t* tokens;
  float* sums;
};

// Rows [N, p] of units: unit u owns rows offsets[u] .. offsets[u + 1]; without offsets every row is a unit.
// Ranges from .. to are of units, of elements, of rows or of columns, as each comment says.
struct KernelTable {
  const char* name;
  // One vector of consecutive blocks at a time; out[word * 16 + block] for 16 of them.
  void (*chacha_blocks16)(const uint32_t* state, uint64_t counter, uint32_t* out);
  void (*gaussian)(const NoiseStream*, int64_t start, int64_t count, float* out);
  // A correlation may be null; its state is that of the whole buffer.
  void (*add_gaussian)(const NoiseStream*, const Correlation*, int64_t start, int64_t from, int64_t to,
                       float noise_std, float* out);
  void (*adam)(const NoiseStream*, const Correlation*, int64_t start, int64_t from, int64_t to, const AdamArgs*);
  void (*sgd)(const NoiseStream*, const Correlation*, int64_t start, int64_t from, int64_t to, const SgdArgs*);
  // Units of more than kLongestGram rows are left alone: the caller has a better method for them.
  void (*outer_sq_norms)(const float* a, const float* g, const int64_t* offsets, int64_t from, int64_t to, int64_t d,
                         int64_t p, float* out);
  void (*diagonal_sq_norms)(const float* rows, const float* factors, const int64_t* offsets, int64_t from, int64_t to,
                            int64_t p, float* out);
  void (*scatter_sq_norms)(const int64_t* ids, const float* g, const int64_t* offsets, int64_t from, int64_t to,
                           int64_t p, float* out);
  // Rows.
  void (*scale_rows)(const float* x, const float* weights, int64_t from, int64_t to, int64_t p, float* out);
  // Columns, of all n rows.
  void (*diagonal_weighted_sum)(const float* rows, const float* factors, const float* weights, int64_t n, int64_t p,
                                int64_t from, int64_t to, float* out);
  void (*scatter_weighted_sum)(const int64_t* ids, const float* g, const float* weights, int64_t n, int64_t p,
                               int64_t from, int64_t to, float* out);
  // Dense products of a unit's rows (core/gemm.inl). Each thread brings scratch memory of as many floats as the
  // function before says; `grads` may be null.
  int64_t (*gram_scratch)(int64_t longest);
  void (*gram_norms)(const float* a, const float* g, const int64_t* offsets, int64_t from, int64_t to, int64_t d,
                     int64_t p, int with_bias, float* out, float* row_sums, float* scratch);
  int64_t (*tile_scratch)(int64_t d, int64_t p);
  void (*tile_norms)(const float* a, const float* g, const int64_t* offsets, int64_t from, int64_t to, int64_t d,
                     int64_t p, float* out, float* row_sums, float* grads, float* scratch);
  void (*rank1_norms)(const float* a, const float* g, int64_t from, int64_t to, int64_t d, int64_t p, float* out,
                      float* row_sums, float* bias_out);
  void (*outer_sum_layout)(int64_t n, int64_t d, int64_t p, int64_t* pieces, int64_t* splits, int64_t* scratch);
  void (*outer_sum)(const float* a, const float* g, const float* weights, int64_t n, int64_t d, int64_t p,
                    int64_t index, float* out, float* bias, float* partial, float* scratch);
  // Convolutions (core/conv.inl).
  int64_t (*conv_scratch)(const ConvShape*);
  void (*conv_norms)(const ConvShape*, const float* x, const float* g, const int64_t* offsets, const int64_t* order,
                     int64_t from, int64_t to, float* out, float* row_sums, float* grads, float* scratch);
  void (*conv_sum)(const ConvShape*, const float* x, const float* g, const float* weights, int64_t from, int64_t to,
                   float* sum, float* scratch);
  int64_t (*conv_gram_scratch)(const ConvShape*);
  void (*conv_gram_norms)(const ConvShape*, const float* x, const float* g, int64_t from, int64_t to, float* out,
                          float* row_sums, float* scratch);
  // Backward passes of normalisations (core/normalize.inl).
  int64_t (*layer_norm_scratch)(int64_t width);
  void (*layer_norm_backward)(const float* x, const float* g, const float* mean, const float* rstd,
                              const float* weight, const int64_t* offsets, const int64_t* order, int64_t from,
                              int64_t to, int64_t width, float* dx, float* scale, float* bias, float* scratch);
  void (*group_norm_backward)(const float* x, const float* g, const float* mean, const float* rstd,
                              const float* weight, int64_t from, int64_t to, int64_t groups, int64_t channels,
                              int64_t length, float* dx, float* scale, float* bias);
  // Plain products (core/product.inl).
  void (*product_layout)(int64_t n, int64_t q, int64_t* pieces, int64_t* scratch);
  void (*product)(const float* x, const float* w, const float* bias, int64_t n, int64_t k, int64_t q,
                  int is_transposed, int64_t index, float* out, float* scratch);
  // Integer noise (core/discrete.inl).
  void (*wide_normals)(const uint64_t* radius, const uint64_t* angle, int64_t n, double* cosines, double* sines);
  void (*rounded_gaussian)(const NoiseStream*, int64_t start, int64_t count, double scale, int64_t* out);
  void (*discrete_release)(const NoiseStream*, int64_t start, int64_t from, int64_t to, const ReleaseArgs*);
  // Samplers (core/decode.inl); from .. to are rows. A block without a weight is a norm alone.
  int64_t (*residual_panels)(int64_t width);
  void (*residual_pack)(const float* weight, const float* scale, const float* shift, const float* bias, int64_t width,
                        float* panels);
  int64_t (*residual_scratch)(int64_t width);
  void (*residual_features)(const ResidualArgs*, int64_t from, int64_t to, float* scratch);
  int64_t (*draw_scratch)(int64_t longest);
  void (*draw_tokens)(const DrawArgs*, int64_t from, int64_t to, float* scratch);
};

const int64_t kLongestGram = 64;
// Places of a kernel that conv_gram_norms takes.
const int64_t kMostTaps = 1024;

}  // namespace synthward
