// Convolutions of 1 to 3 axes (fewer are axes of length 1): per-unit weight gradients without unfolding the images.
//
// The gradient of one image is, for each place in the kernel, a product of the output gradient with the image shifted
// by that place. With the channels last, the inputs at one row of the kernel (kernel width x channels) lie one after
// the other in memory, so the product reads them where they are.
//
// Gradients are [outputs][kernel depth][kernel height][kernel width][channels]: the channels last as well.

SYNTHWARD_INLINE int64_t volume(const int64_t* sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// Extent of the padded image along one axis: what the kernel's places reach.
SYNTHWARD_INLINE int64_t reach(const ConvShape& v, int axis) {
  return (v.out[axis] - 1) * v.stride[axis] + (v.kernel[axis] - 1) * v.dilation[axis] + 1;
}

// Columns that lie one after the other in the image: a row of the kernel, or one place if it is dilated.
SYNTHWARD_INLINE int64_t run_columns(const ConvShape& v) { return v.dilation[2] == 1 ? v.kernel[2] * v.channels : v.channels; }
SYNTHWARD_INLINE int64_t runs(const ConvShape& v) {
  return v.kernel[0] * v.kernel[1] * (v.dilation[2] == 1 ? 1 : v.kernel[2]);
}
SYNTHWARD_INLINE int64_t grad_width(const ConvShape& v) { return runs(v) * round_up(run_columns(v), PANEL); }
SYNTHWARD_INLINE int64_t image_floats(const ConvShape& v) {
  return reach(v, 0) * reach(v, 1) * reach(v, 2) * v.channels + PANEL;
}

// First and last (exclusive) place along an axis of the image that the padded image has.
SYNTHWARD_INLINE void inside(const ConvShape& v, int axis, int64_t* first, int64_t* last) {
  const int64_t end = reach(v, axis) - v.padding[axis];
  *first = v.padding[axis] < 0 ? -v.padding[axis] : 0;
  *last = v.size[axis] < end ? v.size[axis] : end;
}

// The image [channels][depth][height][width] into `to` [reach...][channels]; what is around it stays as it is.
static void load_image(const ConvShape& v, const float* image, float* to) {
  int64_t z0, z1, y0, y1, x0, x1;
  inside(v, 0, &z0, &z1);
  inside(v, 1, &y0, &y1);
  inside(v, 2, &x0, &x1);
  const int64_t plane = volume(v.size), c4 = v.channels / 4 * 4;
  for (int64_t z = z0; z < z1; ++z)
    for (int64_t y = y0; y < y1; ++y) {
      const float* from = image + (z * v.size[1] + y) * v.size[2];
      float* row = to + (((z + v.padding[0]) * reach(v, 1) + y + v.padding[1]) * reach(v, 2) + v.padding[2]) * v.channels;
      for (int64_t c = 0; c < c4; c += 4) {
        const float* channels[4] = {from + c * plane, from + (c + 1) * plane, from + (c + 2) * plane,
                                    from + (c + 3) * plane};
        int64_t x = x0;
        for (; x + 4 <= x1; x += 4) transpose4(channels, x, row + x * v.channels + c, v.channels);
        for (; x < x1; ++x)
          for (int i = 0; i < 4; ++i) row[x * v.channels + c + i] = channels[i][x];
      }
      for (int64_t c = c4; c < v.channels; ++c)
        for (int64_t x = x0; x < x1; ++x) row[x * v.channels + c] = from[c * plane + x];
    }
}

// A little more than the sum of squares, in single precision: for a bound.
SYNTHWARD_INLINE double above_sq_norm(const float* x, int64_t count) {
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES)
    each<4>(SYNTHWARD_BODY(k) {
      const vf part = load(x + i + k.value * LANES);
      sums[k.value] = multiply_add(part, part, sums[k.value]);
    });
  double total = 0.0;
  for (; i < count; ++i) total += (double)x[i] * (double)x[i];
  const vf all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int l = 0; l < LANES; ++l) total += (double)all[l];
  // A term goes through count / (4 LANES) additions, of a rounding of 2^-24 each; LANES is at least 4.
  return total * (1.0 + (double)count * 4e-9) + (double)count * kLost;
}

// A run of places along the last axis of the output: its start in the padded image, and how many.
struct Segment {
  int64_t start, count;
};

// c += the product of the left panel with the image at the segments, read where it is.
SYNTHWARD_INLINE void multiply_segments(const Segment* segments, int64_t n, const float* left, const float* image,
                                        int64_t step, float* c, int64_t width) {
  vf low_sums[TILE_ROWS], high_sums[TILE_ROWS];
  each<TILE_ROWS>(SYNTHWARD_BODY(r) { low_sums[r.value] = high_sums[r.value] = vf{}; });
  for (int64_t s = 0; s < n; ++s) {
    const float* right = image + segments[s].start;
    for (int64_t k = 0; k < segments[s].count; ++k, left += PANEL, right += step) {
      const vf low = load(right), high = load(right + LANES);
      each<TILE_ROWS>(SYNTHWARD_BODY(r) {
        const vf x = splat_float(left[r.value]);
        low_sums[r.value] = multiply_add(x, low, low_sums[r.value]);
        high_sums[r.value] = multiply_add(x, high, high_sums[r.value]);
      });
    }
  }
  each<TILE_ROWS>(SYNTHWARD_BODY(r) {
    float* const row = c + r.value * width;
    store(row, load(row) + low_sums[r.value]);
    store(row + LANES, load(row + LANES) + high_sums[r.value]);
  });
}

// The places of the output from `first` on, at most BLOCK of them, as segments; returns how many segments.
SYNTHWARD_INLINE int64_t segments_from(const ConvShape& v, int64_t first, int64_t count, Segment* to) {
  int64_t n = 0;
  for (int64_t at = first; at < first + count; ++n) {
    const int64_t x = at % v.out[2], row = at / v.out[2], y = row % v.out[1], z = row / v.out[1];
    const int64_t left = first + count - at, here = v.out[2] - x < left ? v.out[2] - x : left;
    to[n].start = ((z * v.stride[0] * reach(v, 1) + y * v.stride[1]) * reach(v, 2) + x * v.stride[2]) * v.channels;
    to[n].count = here;
    at += here;
  }
  return n;
}

// Where in the padded image the places of run `index` of the kernel begin.
SYNTHWARD_INLINE int64_t run_start(const ConvShape& v, int64_t index) {
  int64_t x = 0;
  if (v.dilation[2] != 1) {
    x = index % v.kernel[2] * v.dilation[2];
    index /= v.kernel[2];
  }
  const int64_t y = index % v.kernel[1] * v.dilation[1], z = index / v.kernel[1] * v.dilation[0];
  return ((z * reach(v, 1) + y) * reach(v, 2) + x) * v.channels;
}

// Images whose places are taken together in one chain of sums: as many as fit in a block.
SYNTHWARD_INLINE int64_t images_together(const ConvShape& v) {
  const int64_t fit = BLOCK / volume(v.out);
  return fit < 1 ? 1 : fit;
}

// c [outputs][grad_width] += the sum of weight x gradient over `n` images, which lie one after the other, all of whose
// places fit in a block unless n is 1. g: their output gradients. panels: BLOCK x outputs, rounded up.
static void add_image_grads(const ConvShape& v, const float* images, int64_t n, const float* const* g,
                            const float* weights, float* c, float* panels) {
  const int64_t places = volume(v.out), width = grad_width(v), columns = run_columns(v);
  const int64_t run_width = round_up(columns, PANEL), step = v.stride[2] * v.channels;
  Segment segments[BLOCK];
  for (int64_t at = 0; at < places; at += BLOCK) {
    const int64_t each = places - at < BLOCK ? places - at : (int64_t)BLOCK, count = each * n;
    int64_t found = 0;
    for (int64_t b = 0; b < n; ++b) {
      const Columns left{g[b], places};
      for (int64_t i = 0; i < v.outputs; i += PANEL) {
        float* const to = panels + i * count + b * each * PANEL;
        left.pack(at, each, i, v.outputs - i < PANEL ? v.outputs - i : (int64_t)PANEL, to);
        if (weights && weights[b] != 1.0f)
          for (int64_t k = 0; k < each * PANEL; ++k) to[k] *= weights[b];
      }
      const int64_t more = segments_from(v, at, each, segments + found);
      for (int64_t s = found; s < found + more; ++s) segments[s].start += b * image_floats(v);
      found += more;
    }
    for (int64_t run = 0; run < runs(v); ++run) {
      const float* const start = images + run_start(v, run);
      for (int64_t j = 0; j < columns; j += PANEL)
        for (int64_t i = 0; i < v.outputs; i += TILE_ROWS)
          multiply_segments(segments, found, panels + i / PANEL * PANEL * count + i % PANEL, start + j, step,
                            c + i * width + run * run_width + j, width);
    }
  }
}

// Without the columns that only fill the panels: to [outputs][kernel][channels].
SYNTHWARD_INLINE void store_grad(const ConvShape& v, const float* c, float* to) {
  const int64_t columns = run_columns(v), run_width = round_up(columns, PANEL);
  for (int64_t i = 0; i < v.outputs * runs(v); ++i, c += run_width, to += columns)
    __builtin_memcpy(to, c, sizeof(float) * columns);
}

static int64_t conv_scratch(const ConvShape* v) {
  const int64_t high = round_up(v->outputs, PANEL);
  return images_together(*v) * image_floats(*v) + BLOCK * high + high * grad_width(*v);
}

// For units from .. to: out[u] += |G_u|^2, row_sums[u] += a bound of the sum of the norms of its places' gradients,
// and G_u to grads [units][groups][outputs][kernel][channels] if not null; either of the two may be null. Rows are order[n] (or n) of unit offsets.
static void conv_norms(const ConvShape* shape, const float* x, const float* g, const int64_t* offsets, const int64_t* order,
                       int64_t from, int64_t to, float* out, float* row_sums, float* grads, float* scratch) {
  const ConvShape& v = *shape;
  const int64_t high = round_up(v.outputs, PANEL), width = grad_width(v), places = volume(v.out);
  const int64_t pixels = volume(v.size) * v.channels, numel = v.outputs * volume(v.kernel) * v.channels;
  float *image = scratch, *panels = image + images_together(v) * image_floats(v), *c = panels + BLOCK * high;
  __builtin_memset(image, 0, sizeof(float) * image_floats(v));
  for (int64_t u = from; u < to; ++u) {
    double total = 0.0, lengths = 0.0;
    for (int64_t q = 0; q < v.groups; ++q) {
      __builtin_memset(c, 0, sizeof(float) * high * width);
      for (int64_t n = offsets[u]; n < offsets[u + 1]; ++n) {
        const int64_t row = order ? order[n] : n;
        const float* const rows_g = g + (row * v.groups + q) * v.outputs * places;
        const float* const rows_x = x + (row * v.groups + q) * pixels;
        load_image(v, rows_x, image);
        // A pixel is in at most as many patches as the kernel has places (Cauchy and Schwarz for the rest).
        if (row_sums)
          lengths += __builtin_sqrt((double)volume(v.kernel) * above_sq_norm(rows_x, pixels) *
                                    above_sq_norm(rows_g, v.outputs * places));
        add_image_grads(v, image, 1, &rows_g, nullptr, c, panels);
      }
      if (grads) store_grad(v, c, grads + (u * v.groups + q) * numel);
      if (!row_sums) continue;
      const int64_t columns = run_columns(v), run_width = round_up(columns, PANEL);
      for (int64_t o = 0; o < v.outputs; ++o)
        for (int64_t run = 0; run < runs(v); ++run)
          total += sum_of_squares(c + o * width + run * run_width, columns);
    }
    if (!row_sums) continue;
    out[u] += (float)total;
    row_sums[u] += (float)(lengths * 1.000001);
  }
}

// sum [groups][outputs][kernel][channels] = the sum over rows from .. to of w_n G_n.
static void conv_sum(const ConvShape* shape, const float* x, const float* g, const float* weights, int64_t from, int64_t to,
                     float* sum, float* scratch) {
  const ConvShape& v = *shape;
  const int64_t high = round_up(v.outputs, PANEL), width = grad_width(v), places = volume(v.out);
  const int64_t pixels = volume(v.size) * v.channels, numel = v.outputs * volume(v.kernel) * v.channels;
  const int64_t together = images_together(v), floats = image_floats(v);
  float *images = scratch, *panels = images + together * floats, *c = panels + BLOCK * high;
  __builtin_memset(images, 0, sizeof(float) * together * floats);
  for (int64_t q = 0; q < v.groups; ++q) {
    __builtin_memset(c, 0, sizeof(float) * high * width);
    for (int64_t row = from; row < to;) {
      const float* grads[BLOCK];
      float factors[BLOCK];
      int64_t n = 0;
      for (; row < to && n < together; ++row) {
        if (weights[row] == 0.0f) continue;
        load_image(v, x + (row * v.groups + q) * pixels, images + n * floats);
        grads[n] = g + (row * v.groups + q) * v.outputs * places;
        factors[n++] = weights[row];
      }
      if (n > 0) add_image_grads(v, images, n, grads, factors, c, panels);
    }
    store_grad(v, c, sum + q * numel);
  }
}

// The products of all pairs of columns of x [count][length], upper triangle: c [side][side].
SYNTHWARD_INLINE void gram_of_columns(const float* x, int64_t count, int64_t length, float* panels, float* c) {
  const int64_t side = round_up(length, PANEL);
  const WeightedRows rows{x, length, nullptr, false};
  __builtin_memset(c, 0, sizeof(float) * side * side);
  for (int64_t k = 0; k < count; k += BLOCK) {
    const int64_t here = count - k < BLOCK ? count - k : (int64_t)BLOCK;
    rows.pack(k, here, 0, length, panels);
    for (int64_t j = 0; j < side; j += PANEL)
      for (int64_t i = 0; i < length && i < j + PANEL; i += TILE_ROWS)
        multiply_tile(here, panels + i / PANEL * PANEL * here + i % PANEL, panels + j * here, c + i * side + j, side);
  }
}

static int64_t conv_gram_scratch(const ConvShape* v) {
  const int64_t pixels = reach(*v, 0) * reach(*v, 1) * reach(*v, 2), places = volume(v->out);
  const int64_t side = round_up(pixels, PANEL), high = round_up(places, PANEL);
  return pixels * v->channels + BLOCK * (side > high ? side : high) + side * side + high * high + side + 2 * PANEL;
}

// The image [channels][size...] with zeros around it: to [channels][reach...].
SYNTHWARD_INLINE void pad_image(const ConvShape& v, const float* image, float* to) {
  const int64_t padded = reach(v, 0) * reach(v, 1) * reach(v, 2);
  int64_t z0, z1, y0, y1, x0, x1;
  inside(v, 0, &z0, &z1);
  inside(v, 1, &y0, &y1);
  inside(v, 2, &x0, &x1);
  __builtin_memset(to, 0, sizeof(float) * padded * v.channels);
  for (int64_t c = 0; c < v.channels; ++c)
    for (int64_t z = z0; z < z1; ++z)
      for (int64_t y = y0; y < y1; ++y) {
        const float* from = image + ((c * v.size[0] + z) * v.size[1] + y) * v.size[2];
        float* row = to + c * padded + ((z + v.padding[0]) * reach(v, 1) + y + v.padding[1]) * reach(v, 2) + v.padding[2];
        for (int64_t x = x0; x < x1; ++x) row[x] = from[x];
      }
}

// For stride 1 and units of one row: out[u] += |G_u|^2 from products of pairs of places. The product of two patches
// is a sum of products of pixels, each of which all places of the kernel share: pixels' products are formed once.
static void conv_gram_norms(const ConvShape* shape, const float* x, const float* g, int64_t from, int64_t to, float* out,
                            float* row_sums, float* scratch) {
  const ConvShape& v = *shape;
  const int64_t pixels = reach(v, 0) * reach(v, 1) * reach(v, 2), places = volume(v.out);
  const int64_t side = round_up(pixels, PANEL), high = round_up(places, PANEL), taps = volume(v.kernel);
  float *image = scratch, *panels = image + pixels * v.channels;
  float *inputs = panels + BLOCK * (side > high ? side : high), *outputs = inputs + side * side;
  float* const patch = outputs + high * high;
  int64_t shifts[kMostTaps];
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t kx = tap % v.kernel[2], rest = tap / v.kernel[2];
    const int64_t ky = rest % v.kernel[1], kz = rest / v.kernel[1];
    shifts[tap] = (kz * v.dilation[0] * reach(v, 1) + ky * v.dilation[1]) * reach(v, 2) + kx * v.dilation[2];
  }
  for (int64_t u = from; u < to; ++u) {
    double total = 0.0, lengths = 0.0;
    for (int64_t q = 0; q < v.groups; ++q) {
      pad_image(v, x + (u * v.groups + q) * v.channels * volume(v.size), image);
      gram_of_columns(image, v.channels, pixels, panels, inputs);
      gram_of_columns(g + (u * v.groups + q) * v.outputs * places, v.outputs, places, panels, outputs);
      const int64_t last = ((v.out[0] - 1) * reach(v, 1) + v.out[1] - 1) * reach(v, 2) + v.out[2];
      double squares[2] = {0.0, 0.0};
      for (int64_t s = 0; s < places; ++s) {
        const int64_t sx = s % v.out[2], row = s / v.out[2], sy = row % v.out[1], sz = row / v.out[1];
        const int64_t at = (sz * reach(v, 1) + sy) * reach(v, 2) + sx;
        // patch[t - at] = product of the patches at places s and t of the padded grid, t >= s.
        for (int64_t t = at; t < last; t += LANES) {
          vf sum = {};
          for (int64_t tap = 0; tap < taps; ++tap) {
            sum += load(inputs + (at + shifts[tap]) * side + t + shifts[tap]);
          }
          store(patch + t - at, sum);
        }
        const float* const pairs = outputs + s * high;
        double above = 0.0;
        for (int64_t t = s + 1; t < places;) {
          const int64_t tx = t % v.out[2], trow = t / v.out[2], ty = trow % v.out[1], tz = trow / v.out[1];
          const float* const found = patch + (tz * reach(v, 1) + ty) * reach(v, 2) + tx - at;
          const int64_t here = v.out[2] - tx;
          float part = 0.0f;
          for (int64_t i = 0; i < here; ++i) part += found[i] * pairs[t + i];
          above += (double)part;
          t += here;
        }
        const double own = (double)patch[0] * (double)pairs[s];
        total += own + 2.0 * above;
        lengths += __builtin_sqrt(own > 0.0 ? own : own == own ? 0.0 : own);
        squares[0] += (double)patch[0];
        squares[1] += (double)pairs[s];
      }
      total += lost_products(places, (double)(taps * v.channels), squares[0], (double)v.outputs, squares[1]);
    }
    out[u] += (float)total;
    row_sums[u] += (float)lengths;
  }
}
