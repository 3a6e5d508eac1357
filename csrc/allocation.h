// Large blocks that torch frees are given out again. See allocation.cpp.
#pragma once

namespace synthward {

// Whether torch's large blocks come from malloc from now on. Only where glibc would not use them again, and not
// where another allocator has been put in glibc's place. Safe to call again.
bool reuse_freed_blocks();

}  // namespace synthward
