// Plain products of matrices, by the same panels as the sums over segments (gemm.inl). They are here because what a
// library chooses for a processor of another maker than its own may run at half of its rate.

struct ProductPlan {
  int64_t high, wide, across, pieces;
};

static ProductPlan plan_product(int64_t n, int64_t q) {
  ProductPlan plan;
  plan.high = piece(n, PIECE);
  plan.wide = piece(q, PIECE);
  plan.across = (q + plan.wide - 1) / plan.wide;
  plan.pieces = (n + plan.high - 1) / plan.high * plan.across;
  return plan;
}

static void product_layout(int64_t n, int64_t q, int64_t* pieces, int64_t* scratch) {
  const ProductPlan plan = plan_product(n, q);
  *pieces = plan.pieces;
  *scratch = multiply_scratch(plan.high, plan.wide);
}

// Piece `index` of out[n, q] = x[n, k] w + bias[q] (or null); w is [k, q], or [q, k] if is_transposed.
static void product(const float* x, const float* w, const float* bias, int64_t n, int64_t k, int64_t q,
                    int is_transposed, int64_t index, float* out, float* scratch) {
  const ProductPlan plan = plan_product(n, q);
  const int64_t i = index / plan.across * plan.high, j = index % plan.across * plan.wide;
  const int64_t rows = n - i < plan.high ? n - i : plan.high, columns = q - j < plan.wide ? q - j : plan.wide;
  const int64_t width = round_up(columns, PANEL);
  float *panels = scratch, *c = scratch + BLOCK * (round_up(rows, PANEL) + width);
  const Columns left{x, k};
  if (is_transposed)
    multiply(left, Columns{w, k}, k, i, rows, j, columns, panels, c);
  else
    multiply(left, WeightedRows{w, q, nullptr, false}, k, i, rows, j, columns, panels, c);
  for (int64_t r = 0; r < rows; ++r) {
    float *to = out + (i + r) * q + j, *from = c + r * width;
    if (bias) {
      for (int64_t l = 0; l < columns; ++l) to[l] = from[l] + bias[j + l];
    } else {
      __builtin_memcpy(to, from, sizeof(float) * columns);
    }
  }
}
