// Splitting a range over threads; the only file that knows about threads. Threads live for one call: nothing
// is left behind that a fork could inherit half-way.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace synthward {

// Calls fn(from, to) for the pieces [0, chunk), [chunk, 2 chunk), ... of [0, n), each once. The borders do not
// depend on the number of threads, and a piece writes only what belongs to it: so neither do results. fn must
// not throw. Where the system gives no thread, fewer do the work.
template <typename Fn>
void parallel_for(int64_t n, int64_t chunk, int threads, const Fn& fn) {
  if (n <= 0) return;
  const int64_t chunks = (n + chunk - 1) / chunk;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next.fetch_add(1); i < chunks; i = next.fetch_add(1)) fn(i * chunk, std::min(n, (i + 1) * chunk));
  };
  std::vector<std::thread> workers;
  try {
    for (int64_t i = 1; i < std::min<int64_t>(threads, chunks); ++i) workers.emplace_back(work);
  } catch (const std::system_error&) {
  }
  work();
  for (std::thread& worker : workers) worker.join();
}

}  // namespace synthward
