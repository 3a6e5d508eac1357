// Products with the rows of segments as the inner dimension, in the one form that all of them have here: panels of
// PANEL columns, packed for a block of the inner dimension, multiplied tile by tile in registers. What is done while
// packing (weighting rows, cutting patches out of images) costs no pass of its own.
//
// Sums are of floats: at most BLOCK products in a chain, then one addition per block. The order is fixed by shape
// alone, never by the number of threads; it differs between instruction sets (fused multiply-add or not).

#if defined(__AVX512F__)
enum { TILE_ROWS = 8 };
#else
enum { TILE_ROWS = 4 };
#endif
enum { PANEL = 2 * LANES, BLOCK = 128 };

SYNTHWARD_INLINE vf load(const float* from) {
  vf x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

SYNTHWARD_INLINE vf multiply_add(vf x, vf y, vf z) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#else
  return x * y + z;
#endif
}

SYNTHWARD_INLINE vf splat_float(float x) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(x);
#else
  vf out;
  for (int l = 0; l < LANES; ++l) out[l] = x;
  return out;
#endif
}

SYNTHWARD_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// c[TILE_ROWS][PANEL] += sum over k of left[k][0..TILE_ROWS] x right[k][0..PANEL]; both have rows of PANEL.
SYNTHWARD_INLINE void multiply_tile(int64_t count, const float* left, const float* right, float* c, int64_t width) {
  vf low_sums[TILE_ROWS], high_sums[TILE_ROWS];
  each<TILE_ROWS>(SYNTHWARD_BODY(r) { low_sums[r.value] = high_sums[r.value] = vf{}; });
  for (int64_t k = 0; k < count; ++k, left += PANEL, right += PANEL) {
    const vf low = load(right), high = load(right + LANES);
    each<TILE_ROWS>(SYNTHWARD_BODY(r) {
      const vf x = splat_float(left[r.value]);
      low_sums[r.value] = multiply_add(x, low, low_sums[r.value]);
      high_sums[r.value] = multiply_add(x, high, high_sums[r.value]);
    });
  }
  each<TILE_ROWS>(SYNTHWARD_BODY(r) {
    float* const row = c + r.value * width;
    store(row, load(row) + low_sums[r.value]);
    store(row + LANES, load(row + LANES) + high_sums[r.value]);
  });
}

// The same for the upper half of the columns alone.
SYNTHWARD_INLINE void multiply_upper_half(int64_t count, const float* left, const float* right, float* c,
                                          int64_t width) {
  vf sums[TILE_ROWS];
  each<TILE_ROWS>(SYNTHWARD_BODY(r) { sums[r.value] = vf{}; });
  for (int64_t k = 0; k < count; ++k, left += PANEL, right += PANEL) {
    const vf high = load(right + LANES);
    each<TILE_ROWS>(SYNTHWARD_BODY(r) {
      sums[r.value] = multiply_add(splat_float(left[r.value]), high, sums[r.value]);
    });
  }
  each<TILE_ROWS>(SYNTHWARD_BODY(r) {
    float* const row = c + r.value * width + LANES;
    store(row, load(row) + sums[r.value]);
  });
}

// Operands. pack(k0, count, j0, width, to) writes columns j0 .. j0 + width of inner rows k0 .. k0 + count as panels
// [ceil(width / PANEL)][count][PANEL], filled up with zeros.

namespace {  // no symbol of these leaves the file: see kernel_table.h

// x[k][j], rows of the inner dimension one after the other; weights (or null) multiply them, and a row of weight zero
// is zero whatever it holds.
struct WeightedRows {
  const float* x;
  int64_t stride;
  const float* weights;
  bool is_scaled;  // else the weights only say which rows are zero

  void pack(int64_t k0, int64_t count, int64_t j0, int64_t width, float* to) const {
    for (int64_t j = 0; j < width; j += PANEL) {
      const int64_t here = width - j < PANEL ? width - j : (int64_t)PANEL;
      const float* from = x + k0 * stride + j0 + j;
      for (int64_t k = 0; k < count; ++k, from += stride, to += PANEL) {
        const float w = weights ? weights[k0 + k] : 1.0f;
        if (w == 0.0f) {
          for (int l = 0; l < PANEL; ++l) to[l] = 0.0f;
        } else if (here == PANEL) {
          const vf factor = splat_float(is_scaled ? w : 1.0f);
          store(to, load(from) * factor);
          store(to + LANES, load(from + LANES) * factor);
        } else {
          for (int64_t l = 0; l < PANEL; ++l) to[l] = l < here ? from[l] * (is_scaled ? w : 1.0f) : 0.0f;
        }
      }
    }
  }
};

}  // namespace

typedef float v4 __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));

// Four rows of four floats, transposed, to four places `stride` apart.
SYNTHWARD_INLINE void transpose4(const float* const* rows, int64_t at, float* to, int64_t stride) {
  v4 r[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&r[i], rows[i] + at, sizeof(v4));
  const v4 a = __builtin_shuffle(r[0], r[1], v4i{0, 4, 1, 5}), b = __builtin_shuffle(r[0], r[1], v4i{2, 6, 3, 7});
  const v4 c = __builtin_shuffle(r[2], r[3], v4i{0, 4, 1, 5}), d = __builtin_shuffle(r[2], r[3], v4i{2, 6, 3, 7});
  const v4 out[4] = {__builtin_shuffle(a, c, v4i{0, 1, 4, 5}), __builtin_shuffle(a, c, v4i{2, 3, 6, 7}),
                     __builtin_shuffle(b, d, v4i{0, 1, 4, 5}), __builtin_shuffle(b, d, v4i{2, 3, 6, 7})};
  for (int i = 0; i < 4; ++i) __builtin_memcpy(to + i * stride, &out[i], sizeof(v4));
}

// LANES rows of LANES floats, `count` of them there and the rest zero, transposed to LANES places PANEL apart: at each
// stage, blocks of H change places across the diagonal of blocks of 2 H.
template <int H, int L>
struct Swap {
  static const int low = L & H ? LANES + L - H : L, high = L & H ? LANES + L : L + H;
};

#if defined(__AVX512F__)
#define SYNTHWARD_SWAP(side)                                                                                   \
  vi{Swap<H, 0>::side,  Swap<H, 1>::side,  Swap<H, 2>::side,  Swap<H, 3>::side, Swap<H, 4>::side,  Swap<H, 5>::side,  \
     Swap<H, 6>::side,  Swap<H, 7>::side,  Swap<H, 8>::side,  Swap<H, 9>::side, Swap<H, 10>::side, Swap<H, 11>::side, \
     Swap<H, 12>::side, Swap<H, 13>::side, Swap<H, 14>::side, Swap<H, 15>::side}
#elif defined(__AVX2__)
#define SYNTHWARD_SWAP(side)                                                                                  \
  vi{Swap<H, 0>::side, Swap<H, 1>::side, Swap<H, 2>::side, Swap<H, 3>::side, Swap<H, 4>::side, Swap<H, 5>::side, \
     Swap<H, 6>::side, Swap<H, 7>::side}
#else
#define SYNTHWARD_SWAP(side) vi{Swap<H, 0>::side, Swap<H, 1>::side, Swap<H, 2>::side, Swap<H, 3>::side}
#endif

template <int H>
SYNTHWARD_INLINE void swap_blocks(vf* rows) {
  each<LANES>(SYNTHWARD_BODY(i) {
    if constexpr ((i.value & H) == 0) {
      const vf a = rows[i.value], b = rows[i.value + H];
      rows[i.value] = __builtin_shuffle(a, b, SYNTHWARD_SWAP(low));
      rows[i.value + H] = __builtin_shuffle(a, b, SYNTHWARD_SWAP(high));
    }
  });
  if constexpr (H > 1) swap_blocks<H / 2>(rows);
}

SYNTHWARD_INLINE void transpose(const float* from, int64_t stride, int64_t count, float* to) {
  vf rows[LANES];
  if (count >= LANES)
    each<LANES>(SYNTHWARD_BODY(i) {
      rows[i.value] = load(from + i.value * stride);
      __builtin_prefetch(from + i.value * stride + BLOCK);
    });
  else
    each<LANES>(SYNTHWARD_BODY(i) { rows[i.value] = i.value < count ? load(from + i.value * stride) : vf{}; });
  swap_blocks<LANES / 2>(rows);
  each<LANES>(SYNTHWARD_BODY(i) { store(to + i.value * PANEL, rows[i.value]); });
}

namespace {

// x[j][k]: the inner dimension runs along the rows.
struct Columns {
  const float* x;
  int64_t stride;

  void pack(int64_t k0, int64_t count, int64_t j0, int64_t width, float* to) const {
    for (int64_t j = 0; j < width; j += PANEL, to += count * PANEL) {
      for (int64_t l = 0; l < PANEL; l += LANES) {
        const int64_t here = width - j - l;
        const float* const from = x + (j0 + j + l) * stride + k0;
        int64_t k = 0;
        for (; k + LANES <= count; k += LANES) transpose(from + k, stride, here, to + k * PANEL + l);
        for (; k < count; ++k)
          for (int i = 0; i < LANES; ++i) to[k * PANEL + l + i] = i < here ? from[i * stride + k] : 0.0f;
      }
    }
  }
};

}  // namespace

// sums[0 .. height] += the sums of the columns of panels of `count` rows.
SYNTHWARD_INLINE void add_columns(const float* panels, int64_t count, int64_t height, float* sums) {
  for (int64_t i = 0; i < height; i += PANEL) {
    vf low = {}, high = {};
    for (int64_t k = 0; k < count; ++k, panels += PANEL) {
      low += load(panels);
      high += load(panels + LANES);
    }
    store(sums + i, load(sums + i) + low);
    store(sums + i + LANES, load(sums + i + LANES) + high);
  }
}

// c[rows][columns] (both rounded up to whole panels) = left^T right over `inner` rows, for columns i0 .. of the left
// and j0 .. of the right operand. `panels` holds both packed blocks. left_sums (or null) gets the sums of the columns
// of the left operand as it was packed, whole panels.
template <class Left, class Right>
SYNTHWARD_INLINE void multiply(const Left& left, const Right& right, int64_t inner, int64_t i0, int64_t rows,
                               int64_t j0, int64_t columns, float* panels, float* c, float* left_sums = nullptr) {
  const int64_t height = round_up(rows, PANEL), width = round_up(columns, PANEL);
  __builtin_memset(c, 0, sizeof(float) * height * width);
  float* const packed_right = panels + BLOCK * height;
  for (int64_t k = 0; k < inner; k += BLOCK) {
    const int64_t count = inner - k < BLOCK ? inner - k : (int64_t)BLOCK;
    left.pack(k, count, i0, rows, panels);
    if (left_sums) add_columns(panels, count, height, left_sums);
    right.pack(k, count, j0, columns, packed_right);
    for (int64_t j = 0; j < width; j += PANEL)
      for (int64_t i = 0; i < rows; i += TILE_ROWS)
        multiply_tile(count, panels + i / PANEL * PANEL * count + i % PANEL, packed_right + j * count,
                      c + i * width + j, width);
  }
}

SYNTHWARD_INLINE int64_t multiply_scratch(int64_t rows, int64_t columns) {
  const int64_t height = round_up(rows, PANEL), width = round_up(columns, PANEL);
  return BLOCK * (height + width) + height * width;
}

// Size of the pieces that a dimension is cut into: at most `most`, all about equal, whole panels.
SYNTHWARD_INLINE int64_t piece(int64_t length, int64_t most) {
  const int64_t pieces = (length + most - 1) / most;
  return round_up((length + pieces - 1) / (pieces < 1 ? 1 : pieces), PANEL);
}

// A piece of the sum, with its packed operands, stays in a core's own cache.
enum { PIECE = 256 };

// The products of all pairs of rows of x [rows, width]: c[s][t], s <= t at least, rows rounded up to whole panels.
SYNTHWARD_INLINE void gram(const float* x, int64_t rows, int64_t width, float* panels, float* c) {
  const int64_t side = round_up(rows, PANEL);
  const Columns columns{x, width};
  __builtin_memset(c, 0, sizeof(float) * side * side);
  for (int64_t k = 0; k < width; k += BLOCK) {
    const int64_t count = width - k < BLOCK ? width - k : (int64_t)BLOCK;
    columns.pack(k, count, 0, rows, panels);
    for (int64_t j = 0; j < side; j += PANEL)
      for (int64_t i = 0; i < rows && i < j + PANEL; i += TILE_ROWS) {
        const float* const left = panels + i / PANEL * PANEL * count + i % PANEL;
        if (i < j + LANES)
          multiply_tile(count, left, panels + j * count, c + i * side + j, side);
        else
          multiply_upper_half(count, left, panels + j * count, c + i * side + j, side);
      }
  }
}

// What an inner product of n floats may lose to underflow is below n times this, also where denormals are flushed.
constexpr double kLost = 0x1p-126;

// What underflow may take from the squared norm that the products of `rows` pairs give, |x_st| <= (x_ss + x_tt) / 2
// being summed over all of them: tiny, unless one factor is as large as the other is small.
SYNTHWARD_INLINE double lost_products(int64_t rows, double x_terms, double x_squares, double y_terms, double y_squares) {
  return kLost * (double)rows * (x_terms * y_squares + y_terms * x_squares);
}

static int64_t gram_scratch(int64_t longest) {
  const int64_t side = round_up(longest, PANEL);
  return BLOCK * side + 2 * side * side;
}

// out[u] += |sum_n g_n a_n^T|^2 = sum over pairs of rows (a_s . a_t)(g_s . g_t); row_sums[u] += sum_n |a_n| |g_n|.
// with_bias: each a_n has a one at its end, so that the gradient of a bias is in the norm.
static void gram_norms(const float* a, const float* g, const int64_t* offsets, int64_t from, int64_t to, int64_t d,
                       int64_t p, int with_bias, float* out, float* row_sums, float* scratch) {
  const double one = with_bias ? 1.0 : 0.0;
  for (int64_t u = from; u < to; ++u) {
    const int64_t first = offsets[u], rows = offsets[u + 1] - first, side = round_up(rows, PANEL);
    float *panels = scratch, *left = scratch + BLOCK * side, *right = left + side * side;
    gram(a + first * d, rows, d, panels, left);
    gram(g + first * p, rows, p, panels, right);
    double total = 0.0, lengths = 0.0, squares[2] = {0.0, 0.0};
    for (int64_t s = 0; s < rows; ++s) {
      const float *x = left + s * side, *y = right + s * side;
      double twice = 0.0;
      for (int64_t t = s + 1; t < rows; ++t) twice += ((double)x[t] + one) * (double)y[t];
      const double own = ((double)x[s] + one) * (double)y[s];
      total += own + 2.0 * twice;
      lengths += __builtin_sqrt(own > 0.0 ? own : own == own ? 0.0 : own);
      squares[0] += (double)x[s] + one;
      squares[1] += (double)y[s];
    }
    total += lost_products(rows, (double)d + one, squares[0], (double)p, squares[1]);
    out[u] += (float)total;
    row_sums[u] += (float)lengths;
  }
}

static int64_t tile_scratch(int64_t d, int64_t p) { return multiply_scratch(piece(p, PIECE), piece(d, PIECE)); }

SYNTHWARD_INLINE double sum_of_squares(const float* x, int64_t count) {
  return count > 0 ? row_sq_norm(x, count) : 0.0;
}

// The gradient left^T right of one unit, piece by piece; returns its squared norm, and writes it to grad [p, d] if
// that is not null.
template <class Left, class Right>
SYNTHWARD_INLINE double unit_gradient(const Left& left, const Right& right, int64_t inner, int64_t p, int64_t d,
                                      float* grad, float* scratch) {
  const int64_t high = piece(p, PIECE), wide = piece(d, PIECE);
  float *panels = scratch, *c = scratch + BLOCK * (high + wide);
  double total = 0.0;
  for (int64_t i = 0; i < p; i += high) {
    const int64_t rows = p - i < high ? p - i : high;
    for (int64_t j = 0; j < d; j += wide) {
      const int64_t columns = d - j < wide ? d - j : wide, width = round_up(columns, PANEL);
      multiply(left, right, inner, i, rows, j, columns, panels, c);
      for (int64_t r = 0; r < rows; ++r) {
        total += sum_of_squares(c + r * width, columns);
        if (grad) __builtin_memcpy(grad + (i + r) * d + j, c + r * width, sizeof(float) * columns);
      }
    }
  }
  return total;
}

// out[u] += |sum_n g_n a_n^T|^2, and the gradients themselves to grads [units, p, d] if that is not null.
// row_sums[u] += sum_n |a_n| |g_n|.
static void tile_norms(const float* a, const float* g, const int64_t* offsets, int64_t from, int64_t to, int64_t d,
                       int64_t p, float* out, float* row_sums, float* grads, float* scratch) {
  for (int64_t u = from; u < to; ++u) {
    const int64_t first = offsets[u], rows = offsets[u + 1] - first;
    const WeightedRows left{g + first * p, p, nullptr, false}, right{a + first * d, d, nullptr, false};
    out[u] += (float)unit_gradient(left, right, rows, p, d, grads ? grads + u * p * d : nullptr, scratch);
    double lengths = 0.0;
    for (int64_t n = first; n < first + rows; ++n)
      lengths += __builtin_sqrt(row_sq_norm(a + n * d, d) * row_sq_norm(g + n * p, p));
    row_sums[u] += (float)lengths;
  }
}

// For rows that are units: out[n] += |a_n|^2 |g_n|^2, row_sums[n] += |a_n| |g_n|, bias_out[n] += |g_n|^2 (or null).
static void rank1_norms(const float* a, const float* g, int64_t from, int64_t to, int64_t d, int64_t p, float* out,
                        float* row_sums, float* bias_out) {
  for (int64_t n = from; n < to; ++n) {
    const double x = row_sq_norm(a + n * d, d), y = row_sq_norm(g + n * p, p);
    out[n] += (float)(x * y);
    row_sums[n] += (float)__builtin_sqrt(x * y);
    if (bias_out) bias_out[n] += (float)y;
  }
}

// The weighted sum out[p, d] += sum_n w_n g_n a_n^T is cut into pieces of the output and of the rows; piece `index`
// of `outer_sum_pieces` adds to a part of `out` of its own, or, where the rows are cut, writes to its part of
// `partial` [splits, p, d].
struct SumPlan {
  int64_t high, wide, across, pieces, splits, rows;
};

static SumPlan plan_outer_sum(int64_t n, int64_t d, int64_t p) {
  SumPlan plan;
  plan.high = piece(p, PIECE);
  plan.wide = piece(d, PIECE);
  plan.across = (d + plan.wide - 1) / plan.wide;
  const int64_t tiles = (p + plan.high - 1) / plan.high * plan.across;
  const int64_t wanted = tiles >= 4 ? 1 : 4 / tiles, possible = (n + 8 * BLOCK - 1) / (8 * BLOCK);
  plan.splits = wanted < possible ? wanted : possible < 1 ? 1 : possible;
  plan.rows = round_up((n + plan.splits - 1) / plan.splits, BLOCK);
  plan.pieces = tiles * plan.splits;
  return plan;
}

static void outer_sum_layout(int64_t n, int64_t d, int64_t p, int64_t* pieces, int64_t* splits, int64_t* scratch) {
  const SumPlan plan = plan_outer_sum(n, d, p);
  *pieces = plan.pieces;
  *splits = plan.splits;
  *scratch = multiply_scratch(plan.high, plan.wide) + plan.high;
}

// bias [p] (or null) gets sum_n w_n g_n; where the rows are cut, both go to `partial` [splits, p * d + p].
static void outer_sum(const float* a, const float* g, const float* weights, int64_t n, int64_t d, int64_t p,
                      int64_t index, float* out, float* bias, float* partial, float* scratch) {
  const SumPlan plan = plan_outer_sum(n, d, p);
  const int64_t split = index % plan.splits, tile = index / plan.splits;
  const int64_t i = tile / plan.across * plan.high, j = tile % plan.across * plan.wide;
  const int64_t rows = p - i < plan.high ? p - i : plan.high, columns = d - j < plan.wide ? d - j : plan.wide;
  const int64_t first = split * plan.rows;
  const int64_t inner = n - first < plan.rows ? n - first : plan.rows;
  // The factor goes to the operand that is packed less often.
  const WeightedRows left{g + first * p, p, weights + first, true}, right{a + first * d, d, weights + first, false};
  float *panels = scratch, *c = scratch + BLOCK * (round_up(plan.high, PANEL) + round_up(plan.wide, PANEL));
  float* const sums = bias && j == 0 ? c + plan.high * plan.wide : nullptr;
  if (sums) __builtin_memset(sums, 0, sizeof(float) * plan.high);
  multiply(left, right, inner < 0 ? 0 : inner, i, rows, j, columns, panels, c, sums);
  const int64_t width = round_up(columns, PANEL);
  float* const to = plan.splits > 1 ? partial + split * (p * d + p) : out;
  for (int64_t r = 0; r < rows; ++r) {
    float *row = to + (i + r) * d + j, *from = c + r * width;
    if (plan.splits > 1) {
      __builtin_memcpy(row, from, sizeof(float) * columns);
    } else {
      for (int64_t l = 0; l < columns; ++l) row[l] += from[l];
    }
  }
  if (!sums) return;
  float* const bias_to = (plan.splits > 1 ? to + p * d : bias) + i;
  for (int64_t r = 0; r < rows; ++r) bias_to[r] = plan.splits > 1 ? sums[r] : bias_to[r] + sums[r];
}
