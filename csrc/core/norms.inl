// Per-unit squared norms. Products of two floats are exact in double and all sums are of doubles, in an order
// that is fixed by shape alone: 16 lanes for sums over a row, 8 for the Gram's inner products. So neither the
// instruction set nor the number of threads changes a bit, and nothing overflows or vanishes before the end.

enum { DOT_LANES = 8, DOT_PARTS = DOT_LANES / WIDE, ROW_LANES = 16, ROW_PARTS = ROW_LANES / WIDE };

// The last, incomplete run of a row, filled up with zeros.
SYNTHWARD_INLINE const float* padded(const float* row, int64_t count, float* scratch) {
  for (int l = 0; l < ROW_LANES; ++l) scratch[l] = l < count ? row[l] : 0.0f;
  return scratch;
}

template <int COUNT>
SYNTHWARD_INLINE double tree_sum(const double* lanes) {
  if constexpr (COUNT == 2) {
    return lanes[0] + lanes[1];
  } else {
    double sums[COUNT / 2];
    for (int l = 0; l < COUNT / 2; ++l) sums[l] = lanes[l] + lanes[l + COUNT / 2];
    return tree_sum<COUNT / 2>(sums);
  }
}

SYNTHWARD_INLINE void add_squares(const float* run, vd* sums) {
  each<ROW_PARTS>(SYNTHWARD_BODY(k) {
    const vd x = widen(run + k.value * WIDE);
    sums[k.value] = add_product(x, x, sums[k.value]);
  });
}

SYNTHWARD_INLINE double row_sq_norm(const float* row, int64_t n) {
  vd sums[ROW_PARTS] = {};
  int64_t i = 0;
  for (; i + ROW_LANES <= n; i += ROW_LANES) add_squares(row + i, sums);
  if (i < n) {
    float scratch[ROW_LANES];
    add_squares(padded(row + i, n - i, scratch), sums);
  }
  return tree_sum<ROW_LANES>((const double*)sums);
}

// sums += the inner products of TILE rows x[0], x[1], ... with TILE rows y[0], y[1], ... over DOT_LANES columns.
// SAME: the rows are the same and the upper triangle is enough.
template <bool SAME>
SYNTHWARD_INLINE void tile_step(const float* const* x, const float* const* y, int64_t at, vd (*sums)[TILE][DOT_PARTS]) {
  each<DOT_PARTS>(SYNTHWARD_BODY(k) {
    vd right[TILE];
    each<TILE>(SYNTHWARD_BODY(t) { right[t.value] = widen(y[t.value] + at + k.value * WIDE); });
    each<TILE>(SYNTHWARD_BODY(s) {
      const vd left = SAME ? right[s.value] : widen(x[s.value] + at + k.value * WIDE);
      each<TILE>(SYNTHWARD_BODY(t) {
        vd& sum = sums[s.value][t.value][k.value];
        if (!SAME || t.value >= s.value) sum = add_product(left, right[t.value], sum);
      });
    });
  });
}

// products[s * kLongestGram + t] (= or *=) x_s . x_t for the tile of rows at (s, t). Rows beyond `rows` repeat the
// last.
template <bool SAME>
SYNTHWARD_INLINE void gram_tile(const float* x, int64_t width, int64_t rows, int64_t s0, int64_t t0, bool multiply,
                                double* products) {
  const float *left[TILE], *right[TILE];
  for (int i = 0; i < TILE; ++i) {
    left[i] = x + (s0 + i < rows ? s0 + i : rows - 1) * width;
    right[i] = x + (t0 + i < rows ? t0 + i : rows - 1) * width;
  }
  vd sums[TILE][TILE][DOT_PARTS] = {};
  const int64_t whole = width / DOT_LANES * DOT_LANES;
  for (int64_t at = 0; at < whole; at += DOT_LANES) tile_step<SAME>(left, right, at, sums);
  if (whole < width) {
    float l[TILE][ROW_LANES], r[TILE][ROW_LANES];
    for (int i = 0; i < TILE; ++i) {
      left[i] = padded(left[i] + whole, width - whole, l[i]);
      right[i] = padded(right[i] + whole, width - whole, r[i]);
    }
    tile_step<SAME>(left, right, 0, sums);
  }
  double dots[TILE][TILE][DOT_LANES];
  each<TILE>(SYNTHWARD_BODY(s) {
    each<TILE>(SYNTHWARD_BODY(t) {
      each<DOT_PARTS>(SYNTHWARD_BODY(k) {
        __builtin_memcpy(&dots[s.value][t.value][k.value * WIDE], &sums[s.value][t.value][k.value], sizeof(vd));
      });
    });
  });
  for (int s = 0; s < TILE && s0 + s < rows; ++s)
    for (int t = SAME ? s : 0; t < TILE && t0 + t < rows; ++t) {
      double* place = products + (s0 + s) * kLongestGram + t0 + t;
      const double dot = tree_sum<DOT_LANES>(dots[s][t]);
      *place = multiply ? *place * dot : dot;
    }
}

// The upper triangle of the Gram matrix of the rows, written to or multiplied into products.
static __attribute__((noinline)) void gram(const float* x, int64_t rows, int64_t width, bool multiply,
                                           double* products) {
  for (int64_t s = 0; s < rows; s += TILE) {
    gram_tile<true>(x, width, rows, s, s, multiply, products);
    for (int64_t t = s + TILE; t < rows; t += TILE) gram_tile<false>(x, width, rows, s, t, multiply, products);
  }
}

// ||sum_n g_n a_n^T||^2 = sum_{s,t} (a_s . a_t) (g_s . g_t): the upper triangle of two Gram matrices.
static double gram_sq_norm(const float* a, const float* g, int64_t rows, int64_t d, int64_t p) {
  double products[kLongestGram * kLongestGram];
  gram(a, rows, d, false, products);
  gram(g, rows, p, true, products);
  double diagonal = 0.0, above = 0.0;
  for (int64_t s = 0; s < rows; ++s) {
    diagonal += products[s * kLongestGram + s];
    for (int64_t t = s + 1; t < rows; ++t) above += products[s * kLongestGram + t];
  }
  return diagonal + 2.0 * above;
}

static void outer_sq_norms(const float* a, const float* g, const int64_t* offsets, int64_t from, int64_t to, int64_t d,
                           int64_t p, float* out) {
  for (int64_t u = from; u < to; ++u) {
    const int64_t first = offsets ? offsets[u] : u;
    const int64_t rows = (offsets ? offsets[u + 1] : u + 1) - first;
    if (rows < 1 || rows > kLongestGram) continue;
    const float *ua = a + first * d, *ug = g + first * p;
    out[u] += (float)(rows == 1 ? row_sq_norm(ua, d) * row_sq_norm(ug, p) : gram_sq_norm(ua, ug, rows, d, p));
  }
}

// Runs of ROW_LANES columns whose sums over rows are held in registers at once.
enum { COLUMN_RUNS = TILE };

// The rows that are added up: first .. last, or those of them whose id is `id`.
struct Rows {
  const float *rows, *factors;
  const int64_t* ids;
  int64_t id, first, last, p;
};

// lanes += the squares of the sums of RUNS * ROW_LANES columns from c on, over the rows.
template <int RUNS, bool PADDED>
SYNTHWARD_INLINE void add_column_squares(const Rows& r, int64_t c, vd* lanes) {
  vd sums[RUNS * ROW_PARTS] = {};
  float scratch[2][ROW_LANES];
  for (int64_t n = r.first; n < r.last; ++n) {
    if (r.ids && r.ids[n] != r.id) continue;
    const float* x = r.rows + n * r.p + c;
    const float* f = r.factors ? r.factors + n * r.p + c : nullptr;
    if (PADDED) {
      x = padded(x, r.p - c, scratch[0]);
      if (f) f = padded(f, r.p - c, scratch[1]);
    }
    each<RUNS * ROW_PARTS>(SYNTHWARD_BODY(k) {
      const vd wide = widen(x + k.value * WIDE);
      vd& sum = sums[k.value];
      sum = f ? add_product(wide, widen(f + k.value * WIDE), sum) : sum + wide;
    });
  }
  each<RUNS * ROW_PARTS>(SYNTHWARD_BODY(k) { lanes[k.value % ROW_PARTS] += sums[k.value] * sums[k.value]; });
}

static double summed_sq_norm(const Rows& r) {
  vd lanes[ROW_PARTS] = {};
  int64_t c = 0;
  for (; c + COLUMN_RUNS * ROW_LANES <= r.p; c += COLUMN_RUNS * ROW_LANES)
    add_column_squares<COLUMN_RUNS, false>(r, c, lanes);
  for (; c + ROW_LANES <= r.p; c += ROW_LANES) add_column_squares<1, false>(r, c, lanes);
  if (c < r.p) add_column_squares<1, true>(r, c, lanes);
  return tree_sum<ROW_LANES>((const double*)lanes);
}

static void diagonal_sq_norms(const float* rows, const float* factors, const int64_t* offsets, int64_t from, int64_t to,
                              int64_t p, float* out) {
  for (int64_t u = from; u < to; ++u) {
    const int64_t first = offsets ? offsets[u] : u, last = offsets ? offsets[u + 1] : u + 1;
    if (last - first == 1 && !factors)
      out[u] += (float)row_sq_norm(rows + first * p, p);
    else
      out[u] += (float)summed_sq_norm({rows, factors, nullptr, 0, first, last, p});
  }
}

// Rows of a unit that hit the same table row add up before they are squared. A negative id is no row at all.
static void scatter_sq_norms(const int64_t* ids, const float* g, const int64_t* offsets, int64_t from, int64_t to,
                             int64_t p, float* out) {
  for (int64_t u = from; u < to; ++u) {
    const int64_t first = offsets ? offsets[u] : u, last = offsets ? offsets[u + 1] : u + 1;
    double total = 0.0;
    for (int64_t s = first; s < last; ++s) {
      int64_t earlier = 0, later = 0;
      for (int64_t t = first; t < s; ++t) earlier += ids[t] == ids[s];
      if (ids[s] < 0 || earlier) continue;
      for (int64_t t = s + 1; t < last; ++t) later += ids[t] == ids[s];
      total += later ? summed_sq_norm({g, nullptr, ids, ids[s], s, last, p}) : row_sq_norm(g + s * p, p);
    }
    out[u] += (float)total;
  }
}
