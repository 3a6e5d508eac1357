// Weighted rows and their sums. A weight of zero means that the row is not there: what it holds, NaN or infinity
// included, goes nowhere.

static void scale_rows(const float* x, const float* weights, int64_t from, int64_t to, int64_t p, float* out) {
  for (int64_t n = from; n < to; ++n) {
    const float w = weights[n];
    const float* __restrict row = x + n * p;
    float* __restrict target = out + n * p;
    if (w == 0.0f)
      for (int64_t i = 0; i < p; ++i) target[i] = 0.0f;
    else
      for (int64_t i = 0; i < p; ++i) target[i] = w * row[i];
  }
}

enum { SUM_COLUMNS = 256 };

// out[c] += sum_n w_n rows[n][c] factors[n][c] for the columns from .. to; sums over rows are of doubles.
static void diagonal_weighted_sum(const float* rows, const float* factors, const float* weights, int64_t n, int64_t p,
                                  int64_t from, int64_t to, float* out) {
  for (int64_t c = from; c < to; c += SUM_COLUMNS) {
    const int64_t width = to - c < SUM_COLUMNS ? to - c : (int64_t)SUM_COLUMNS;
    double sums[SUM_COLUMNS] = {0};
    for (int64_t r = 0; r < n; ++r) {
      const double w = (double)weights[r];
      if (w == 0.0) continue;
      const float* __restrict x = rows + r * p + c;
      if (factors) {
        const float* __restrict f = factors + r * p + c;
        for (int64_t i = 0; i < width; ++i) sums[i] += w * ((double)x[i] * (double)f[i]);
      } else {
        for (int64_t i = 0; i < width; ++i) sums[i] += w * (double)x[i];
      }
    }
    for (int64_t i = 0; i < width; ++i) out[c + i] += (float)sums[i];
  }
}

// out[ids[n]][c] += w_n g[n][c] for the columns from .. to, row after row. A negative id is no row.
static void scatter_weighted_sum(const int64_t* ids, const float* g, const float* weights, int64_t n, int64_t p,
                                 int64_t from, int64_t to, float* out) {
  for (int64_t r = 0; r < n; ++r) {
    const float w = weights[r];
    if (w == 0.0f || ids[r] < 0) continue;
    const float* __restrict row = g + r * p;
    float* __restrict target = out + ids[r] * p;
    for (int64_t i = from; i < to; ++i) target[i] += w * row[i];
  }
}
