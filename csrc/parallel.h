// Splitting a range over threads; the only file that knows about threads.
//
// Torch's own threads do the work where they can be found: a second set of threads would share the cores with
// torch's, which go on spinning for a while after each of its operations. Its OpenMP runtime is looked up among the
// libraries that are loaded already and never linked. Elsewhere, and in a forked child (whose OpenMP threads did
// not survive the fork), threads live for one call.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace synthward {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__unix__) || defined(__APPLE__)
inline std::atomic<bool>& is_forked() {
  static std::atomic<bool> flag{false};
  return flag;
}

// Call once, when the module is loaded.
inline void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { is_forked() = true; });
}

inline GompParallel find_gomp() {
  static std::atomic<GompParallel> found{nullptr};
  if (is_forked()) return nullptr;
  if (found == nullptr) found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}
#else
inline void watch_forks() {}
inline GompParallel find_gomp() { return nullptr; }
#endif

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
  const int team = static_cast<int>(std::min<int64_t>(threads, chunks));
  if (team <= 1) return work();
  if (const GompParallel run = find_gomp()) {
    run([](void* call) { (*static_cast<decltype(work)*>(call))(); }, const_cast<void*>(static_cast<const void*>(&work)),
        static_cast<unsigned>(team), 0);
    return;
  }
  std::vector<std::thread> workers;
  try {
    for (int i = 1; i < team; ++i) workers.emplace_back(work);
  } catch (const std::system_error&) {
  }
  work();
  for (std::thread& worker : workers) worker.join();
}

}  // namespace synthward
