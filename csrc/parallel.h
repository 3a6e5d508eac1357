// Splitting a range over threads; the only file that knows about threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace synthward {

// Calls fn(from, to) over [0, n) in contiguous pieces whose borders are multiples of `align`. Results may not
// depend on the split: every element is computed from its own index alone.
template <typename Fn>
void parallel_for(int64_t n, int64_t align, int64_t min_piece, int threads, Fn fn) {
  if (n <= 0) return;
  int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(threads, n / std::max<int64_t>(min_piece, 1)));
  int64_t piece = (n + pieces - 1) / pieces;
  piece = (piece + align - 1) / align * align;
  if (piece >= n) {
    fn(int64_t{0}, n);
    return;
  }
  std::vector<std::thread> workers;
  for (int64_t from = piece; from < n; from += piece)
    workers.emplace_back([=] { fn(from, std::min(n, from + piece)); });
  fn(int64_t{0}, piece);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace synthward
